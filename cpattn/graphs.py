"""What ``torch.compile`` leaves out of its graphs: a call has collectives, memory of its own and decisions on the host. Where
there is an operator for a call, the graph has that.

``torch.compiler.disable`` does the same, but imports torch's compiler, and with it Triton, as soon as it is called. It
costs every call more than a microsecond (1.25 us on the CPU that the tests run on). The two marks here cost nothing:
one stops the compiler from inlining a function, the other from compiling it, and what it calls, when it runs by itself.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any, TypeVar

import torch

try:  # Alike in torch 2.9 to 2.14, but no public interface.
    from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
except ImportError:
    marks_are_known = False
else:
    marks_are_known = True

T = TypeVar("T")

_WHY = (
    "cpattn runs outside of graphs, with collectives and memory of its own: compile without fullgraph=True. Graphs can hold "
    "cp_attention, attend, shard, unshard and write_kv where no tensor requires a gradient, strategy= and backend= are names, there is no "
    "expand=, and a PagedKV was made outside of the graph; and of the metadata's tables position_ids, token_index and restore_index"
)


def is_exporting() -> bool:
    """Whether torch.export traces what runs. ``torch.compiler.is_exporting()`` says so wherever Dynamo of torch 2.11 traces."""
    return bool(getattr(torch.compiler, "_is_exporting_flag", False))


def leaves_graph(part: T) -> T:
    """Lets a compiled graph end before a function, and go on after it. Of a class, all methods.

    Properties are traced: a graph cannot end where an attribute is read, and the function around it would not be compiled.

    >>> @leaves_graph
    ... def rows_here(x):
    ...     return len(x)
    >>> rows_here([1, 2])
    2
    """
    if isinstance(part, type):
        for name, member in list(vars(part).items()):
            if isinstance(member, FunctionType):
                setattr(part, name, _marked(member))
        return part
    return _marked(part)


def has_operator(function: T) -> T:
    """For a function that calls an operator where ``torch.compiler.is_dynamo_compiling()`` says that it is in a graph: it is
    traced there. When it runs by itself it is not compiled, nor is what it calls.

    >>> @has_operator
    ... def total(x):
    ...     return x.sum() if torch.compiler.is_dynamo_compiling() else sum(x.tolist())
    >>> total(torch.ones(2))
    2.0
    """
    if not marks_are_known:
        return _marked(function)
    _leave_alone(function)
    return function


def constant_in_graphs(function: T) -> T:
    """Has a compiler call a function when it makes a graph, and take what that returns as a constant: for one that depends on nothing
    else than its arguments, which are constants.

    ``torch.compiler.assume_constant_result`` does the same, but imports torch's compiler as soon as it is called.

    >>> @constant_in_graphs
    ... def is_short(name):
    ...     return len(name) < 5
    >>> is_short("ring")
    True
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def _marked(function: T) -> T:
    if not marks_are_known:
        marked: T = torch.compiler.disable(function, reason=_WHY)  # type: ignore[no-untyped-call]
        return marked
    _leave_alone(function)
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    function._torchdynamo_disable_msg = _WHY  # type: ignore[attr-defined]
    return function


def _leave_alone(function: Any) -> None:
    assert isinstance(function, FunctionType)
    set_code_exec_strategy(function.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))
