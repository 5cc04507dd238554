"""Calls as a compiled graph holds them: from arguments to operators, and back to arguments where the operator runs.

The first half is traced by Dynamo, and kept to what it can trace. It checks nothing but whether the operator can take the
arguments at all.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from cpattn.call.arguments import Arguments
from cpattn.errors import GroupError
from cpattn.graphs import is_exporting
from cpattn.handles import resolve
from cpattn.kv_cache import PackedKV, PagedKV
from cpattn.metadata.cp_metadata import CPMetadata
from cpattn.ops import ORDER, options_text, width_of
from cpattn.transports.groups import Group
from cpattn.transports.process_group import DESTROYED
from cpattn.transports.transport import Transport


def is_traced() -> bool:
    """Whether this is in a graph that is being made. Always False where code runs."""
    return torch.compiler.is_dynamo_compiling()


def enters_graph(meta: CPMetadata | None) -> bool:
    """Whether a call that may have no metadata is traced. torch.export traces what runs, where a call without metadata of its own
    goes through the operator; so may such a call of another thread meanwhile, with the same result."""
    return torch.compiler.is_dynamo_compiling() or (meta is None and is_exporting())


def attention_in_graph(arguments: Arguments, meta: CPMetadata | None, group: Group, more: dict[str, Any]) -> Any:
    """What ``cp_attention`` returns for these arguments, from its operator; NotImplemented where that cannot take them.

    Args:
        more: return_lse, check, label, and whatever else was given by keyword.
    """
    q, k, v, v_dim, cache, strategy, backend, overlap, scale, window, softcap, sinks, _, expand = arguments
    # No operator takes a function.
    if expand is not None:
        return NotImplemented
    if not (_fits(arguments, meta) and isinstance(k, Tensor) and _is_line(strategy) and group_fits(group) and are_options(more)):
        return NotImplemented
    options: dict[str, Any] = {"v_dim": v_dim, "backend": backend, "scale": scale, "window": window, "softcap": softcap, **more}
    text = options_text({**options, "strategy": strategy, "overlap": overlap, "group_name": group_name(group)})
    handle, operators = None if meta is None else meta.handle, torch.ops.cpattn

    def call(out: Tensor | None) -> Any:
        given = q, k, v, handle, order(), group_handle(group), text, sinks, out
        if cache is None:
            return operators.attention.default(*given)
        if isinstance(cache, PackedKV):
            return operators.attention.packed(*given, cache.k, cache.v)
        return operators.attention.paged(*given, *pages_in_graph(cache), cache.page_table, cache_handle(cache))

    return _results(call, arguments, width_of(k if v is None else v), more["return_lse"])


def attend_in_graph(arguments: Arguments, meta: CPMetadata | None, group: Group, more: dict[str, Any]) -> Any:
    """What ``attend`` returns for these arguments, from its operator; NotImplemented where that cannot take them.

    Args:
        more: return_lse, check, and whatever else was given by keyword.
    """
    q, _, _, v_dim, cache, _, backend, _, scale, window, softcap, sinks, _, _ = arguments
    if not (_fits(arguments, meta) and isinstance(cache, PagedKV) and group_fits(group) and are_options(more)):
        return NotImplemented
    options: dict[str, Any] = {"v_dim": v_dim, "backend": backend, "scale": scale, "window": window, "softcap": softcap, **more}
    text = options_text({**options, "group_name": group_name(group)})
    handle = None if meta is None else meta.handle
    pages = *pages_in_graph(cache), cache.page_table, cache_handle(cache)
    v_head_dim = width_of(cache.k_pages if cache.v_pages is None else cache.v_pages)

    def call(out: Tensor | None) -> Any:
        return torch.ops.cpattn.attend.default(q, handle, order(), group_handle(group), text, sinks, out, *pages, v_head_dim)

    return _results(call, arguments, v_head_dim, more["return_lse"])


def _results(call: Callable[[Tensor | None], Any], arguments: Arguments, v_head_dim: int, return_lse: bool) -> Any:
    """Those of a call, whose operator is given the memory for its result, or none."""
    into = arguments.out
    if into is not None and _is_result(into, arguments.q, v_head_dim if arguments.v_dim is None else arguments.v_dim):
        # Of a view that an operator writes to, torch's own compiler loses the place in graphs of dynamic sizes (torch 2.13).
        out, lse = call(None)
        out = into.copy_(out)
    else:
        out, lse = call(into)
        out = out if into is None else into
    return (out, lse) if return_lse else out


def _is_result(into: Tensor, q: Tensor, width: int) -> bool:
    """Whether a result can be copied there. The operator refuses what it cannot. Exported programs write there at once."""
    is_alike = into.dtype == q.dtype and into.device == q.device and into.ndim == 3
    return is_alike and tuple(into.shape) == (*q.shape[:-1], width) and not is_exporting()


def order() -> Tensor | None:
    """The operators' ``order``. A constant that is written to cannot be exported; what exported programs have is in order."""
    return None if is_exporting() else ORDER


def cache_fits(cache: Any) -> bool:
    """Whether operators take a cache; a graph ends before calls over others. Of a PagedKV that the graph itself makes nobody can see
    whether K and V share memory. Exported programs make it, and are run as they are."""
    if not isinstance(cache, PagedKV):
        return isinstance(cache, PackedKV)
    # The graph itself may write scales, or a call those of tokens, and no operator says so.
    return cache.k_scale is None and (not cache.is_of_graph or is_exporting())


def pages_in_graph(cache: PagedKV) -> tuple[Tensor, Tensor | None]:
    """The operators' ``k_pages`` and ``v_pages``: see :attr:`PagedKV.written`."""
    if not is_exporting():
        # Makes the sizes of pages constants of the graph, which they are to an engine: index() asks a symbol for its number. Of symbols
        # torch 2.13 cannot work out strides where the graph itself uses the pages besides.
        for x in (*cache.written, cache.k_pages, cache.v_pages):
            for size in () if x is None else x.shape:
                operator.index(size)
    return cache.written


def cache_handle(cache: PagedKV) -> Tensor | None:
    """The operators' ``cache``. An exported program is to have none, and its operators refuse any."""
    return ORDER if is_exporting() and not cache.is_of_graph else cache.handle


def group_fits(group: Any) -> bool:
    """Whether an operator can be told of a group."""
    if group is None or isinstance(group, dist.ProcessGroup):
        return True
    return group.ndim == 1 if isinstance(group, DeviceMesh) else isinstance(group, Transport)


def group_handle(group: Group) -> Tensor | None:
    """The operator's ``group``."""
    return group.handle if isinstance(group, Transport) else None


def group_name(group: Group) -> str | None:
    """The operator's ``group_name``, by which torch knows process groups."""
    if isinstance(group, DeviceMesh):
        group = group.get_group()
    return group.group_name if isinstance(group, dist.ProcessGroup) else None


def is_plain(*tensors: Any) -> bool:
    """Whether operators take all of them: no classes of their own, such as DTensor, and nothing that needs a gradient."""
    given = [x for x in tensors if x is not None]
    if is_exporting():
        # All of them are of classes that stand for tensors. A program may be exported with gradients on, and run without.
        return all(isinstance(x, Tensor) for x in given)
    needs_grad = torch.is_grad_enabled()
    return all((type(x) is Tensor or issubclass(type(x), nn.Parameter)) and not (needs_grad and x.requires_grad) for x in given)


def _fits(arguments: Arguments, meta: Any) -> bool:
    cache: Any = arguments.kv_cache
    if cache is not None and not cache_fits(cache):
        return False
    tensors = [arguments.q, arguments.k, arguments.v, arguments.sinks, arguments.out]
    if isinstance(cache, PagedKV):
        tensors += [cache.k_pages, cache.v_pages, cache.page_table]
    elif cache is not None:
        tensors += [cache.k, cache.v]
    if not (meta is None or type(meta) is CPMetadata) or not isinstance(arguments.q, Tensor) or not is_plain(*tensors):
        return False
    integers = (arguments.v_dim, arguments.overlap, arguments.window)
    numbers = (*integers, arguments.scale, arguments.softcap)
    if any(isinstance(x, bool) for x in numbers) or not all(x is None or isinstance(x, int) for x in integers):
        return False
    if not all(x is None or isinstance(x, (int, float)) for x in numbers):
        return False
    return _is_line(arguments.backend)


def are_options(more: dict[str, Any]) -> bool:
    """Whether return_lse, check and label are what operators take."""
    label = more.get("label")
    if not all(name in ("return_lse", "check", "label") for name in more):
        return False
    return (label is None or _is_line(label)) and all(isinstance(more.get(flag, False), bool) for flag in ("return_lse", "check"))


def _is_line(name: Any) -> bool:
    return isinstance(name, str) and "\n" not in name


def group_of(handle: Tensor | None, name: str | None) -> Group:
    """The group of a call again, where the operator runs. Raises GroupError for a process group that has been destroyed."""
    if name is not None:
        # torch's own graphs name groups in this way, in all releases from 2.9 on.
        try:
            group: dist.ProcessGroup = dist.distributed_c10d._resolve_process_group(name)  # type: ignore
        except RuntimeError:  # torch's, for a name that it does not know
            raise GroupError(DESTROYED) from None
        return group
    if handle is None:
        return None
    return resolve(handle, Transport)


def cache_as_given(k_pages: Tensor, v_pages: Tensor | None, page_table: Tensor | None, handle: Tensor | None) -> PagedKV:
    """The cache of a call again, where the operator runs: over the pages that the graph gives, which may be a copy of the engine's own
    that the graph puts back later.

    Args:
        page_table: None for a call that does not look at it.
    """
    if handle is None:
        return PagedKV(k_pages, v_pages, k_pages if page_table is None else page_table)
    cache = resolve(handle, PagedKV)
    if v_pages is None and cache.v_pages is not None:
        k_pages, v_pages = _parts_of(k_pages, cache.written[0], cache.k_pages, cache.v_pages)
    table = cache.page_table if page_table is None else page_table
    if _is_same(k_pages, cache.k_pages) and _is_same(v_pages, cache.v_pages) and _is_same(table, cache.page_table):
        return cache
    return PagedKV(k_pages, v_pages, table, cache.lines)


def _parts_of(memory: Tensor, own: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """K and V in the memory of both: in the engine's own, or in a copy of that."""
    if memory.data_ptr() == own.data_ptr():
        return k, v
    moved = memory.storage_offset() - own.storage_offset()
    k_there, v_there = (memory.as_strided(x.shape, x.stride(), x.storage_offset() + moved) for x in (k, v))
    return k_there, v_there


def _is_same(x: Tensor | None, other: Tensor | None) -> bool:
    if x is None or other is None:
        return x is other
    return x is other or (x.data_ptr() == other.data_ptr() and x.shape == other.shape)


def results_of(out: Tensor, lse: Tensor | None, into: Tensor | None) -> tuple[Tensor, Tensor]:
    """What an operator returns: memory that nobody else has, contiguous as its shapes say."""
    if into is not None:
        out = out.new_empty(0)
    elif not out.is_contiguous():
        out = out.contiguous()
    if lse is None:
        return out, _nothing(out.device)
    return out, lse if lse.is_contiguous() else lse.contiguous()


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _nothing(device: torch.device) -> Tensor:
    """What stands for an LSE that is not asked for. It has no memory, so that all calls can return it."""
    return torch.empty(0, dtype=torch.float32, device=device)
