"""The operators that compiled graphs call, ``torch.ops.cpattn``: their schemas, and the shapes of what they return.

What they compute is registered beside the calls that they stand for (:func:`implements`), which are imported when one is first
called. They are registered directly: ``torch.library.custom_op`` would cost the host several microseconds more in each call.

- ``meta``, ``group`` and ``cache`` are handles (:mod:`cpattn.handles`) of a CPMetadata, a Transport and a PagedKV.
  Without ``meta`` it is that of the :func:`cpattn.forward_context`.
- ``order`` is one tensor for all calls, and counts as written: so a compiler keeps them in their order, on every rank the same.
- Pages are declared as written: so a compiler keeps in order what else reads and writes them. Where K and V share memory, ``k_pages`` is
  all of that (``PagedKV.written``), and ``cache`` says where the two lie in it. The operator may be given a copy, which goes back later.
- Sizes are SymInt: a graph takes any. Wrong arguments are refused where the operator runs, with the words of the call.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from typing import Any, NamedTuple, TypeVar
from urllib.parse import unquote

import torch
from torch import Tensor

from cpattn.errors import UnsupportedError
from cpattn.graphs import is_exporting

F = TypeVar("F", bound=Callable[..., Any])

# Nothing has a default: torch's own compiler would pass each such argument by keyword, which costs the host 0.4 us apiece.
_ATTENTION = "Tensor q, Tensor k, Tensor? v, Tensor? meta, Tensor(a!)? order, Tensor? group, str options, Tensor? sinks, Tensor(b!)? out"
_ATTEND = "Tensor q, Tensor? meta, Tensor(a!)? order, Tensor? group, str options, Tensor? sinks, Tensor(b!)? out"
_PAGES = "Tensor k_pages, Tensor? v_pages, Tensor page_table, Tensor? cache"
_WRITTEN_PAGES = "Tensor(c!) k_pages, Tensor(d!)? v_pages"

SCHEMAS = {
    "attention": f"({_ATTENTION}) -> (Tensor, Tensor)",
    "attention.paged": f"({_ATTENTION}, {_WRITTEN_PAGES}, Tensor page_table, Tensor? cache) -> (Tensor, Tensor)",
    "attention.packed": f"({_ATTENTION}, Tensor packed_k, Tensor? packed_v) -> (Tensor, Tensor)",
    "attend": f"({_ATTEND}, {_PAGES}, SymInt v_head_dim) -> (Tensor, Tensor)",
    "write": f"(Tensor k, Tensor? v, Tensor slots, bool check, Tensor(a!)? order, {_WRITTEN_PAGES}, Tensor? cache) -> ()",
    "shard": "(Tensor x, Tensor meta, SymInt rows, int dim) -> Tensor",
    "unshard": "(Tensor x, Tensor meta, Tensor(a!)? order, Tensor? group, SymInt rows, str options) -> Tensor",
    "token_mask": "(Tensor attention_mask, int config, Tensor(a!)? order) -> ()",
    "table": "(Tensor meta, str name, SymInt size, Device device) -> Tensor",
}
"""Of each operator. ``options`` is the text of a :class:`Options`; ``table`` is one of the metadata's, such as ``position_ids``;
``rows`` are those of the result; ``token_mask`` looks whether a model of transformers was given the mask of its context, and
``config`` is the ``id`` of its config."""


class Options(NamedTuple):
    """The options of a call that are numbers and names, which an operator takes as one text: those that are not as they are by default.
    To pass them one by one would cost the host 0.2 us apiece."""

    v_dim: int | None = None
    strategy: str = "auto"
    backend: str = "auto"
    overlap: int | None = None
    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    return_lse: bool = False
    check: bool = False
    label: str | None = None
    group_name: str | None = None


_DEFAULTS = Options()._asdict()
_NAMES = ("strategy", "backend", "label", "group_name")
# Between options. Not a line break: on GPUs torch 2.11 to 2.13 writes the text into a comment of one line.
_SEPARATOR = ";"


@lru_cache(maxsize=1024)
def parse_options(text: str) -> Options:
    """What a text stands for.

    >>> parse_options("window=64;return_lse=True").window
    64
    """
    found: dict[str, Any] = {}
    for option in text.split(_SEPARATOR) if text else ():
        name, value = option.split("=", 1)
        found[name] = unquote(value) if name in _NAMES else value == "True" if value in ("True", "False") else _number(value)
    return Options(**found)


def _number(text: str) -> int | float:
    if "x" in text:
        return float.fromhex(text)
    return int(text) if text.lstrip("-").isdigit() else float(text)


def options_text(options: dict[str, Any]) -> str:
    """The text for an operator. Compilers trace this, and take the values as constants.

    >>> options_text({"window": 64, "scale": 0.5, "backend": "auto"})
    'window=64;scale=0x1.0000000000000p-1'
    """
    return _SEPARATOR.join([f"{name}={_written(value)}" for name, value in options.items() if value != _DEFAULTS[name]])


def _written(value: Any) -> str:
    if isinstance(value, float):
        # Of what is a symbol to a compiler, this and index() ask for the number.
        return value.hex()
    if isinstance(value, str):
        # Names may be of any characters; unquote() reads these. Compilers cannot trace quote().
        return value.replace("%", "%25").replace(_SEPARATOR, "%3B").replace("\n", "%0A").replace("\r", "%0D")
    return f"{value}" if isinstance(value, bool) else f"{operator.index(value)}"


# Where torch captures CUDA graphs by itself, these stay outside: they work on the host, differently for each batch.
_TAGS = tuple(tag for tag in (getattr(torch.Tag, "cudagraph_unsafe", None),) if tag is not None)
_LIBRARY = torch.library.Library("cpattn", "DEF")  # type: ignore[no-untyped-call]
for _name, _schema in SCHEMAS.items():
    _LIBRARY.define(_name + _schema, tags=_TAGS)  # type: ignore[no-untyped-call]

NOT_EXPORTED = (
    "an exported program outlives the metadata of a batch, and its cache: pass meta=None to cp_attention and attend, and run the program "
    "within cpattn.forward_context(meta, group=...); shard before it, unshard after it, and give it meta.position_ids, pages and page "
    "table as inputs, of which it makes the PagedKV"
)
"""What torch.export is told of other calls."""

with torch.inference_mode(False):
    ORDER = torch.tensor(0, device="cpu")


# Where the calls are that operators stand for. An exported program may run before anyone has imported them.
_IMPLEMENTED_IN = {
    "attention": "cpattn.call.attention",
    "attend": "cpattn.serving",
    "write": "cpattn.serving",
    "shard": "cpattn.api",
    "unshard": "cpattn.api",
    "token_mask": "cpattn.integrations.transformers.attention",
    "table": "cpattn.metadata.cp_metadata",
}
_PLACEHOLDERS: dict[str, torch.library.Library] = {}


def implements(name: str) -> Callable[[F], F]:
    """Makes a function what an operator computes, on any device."""

    def register(function: F) -> F:
        placeholder = _PLACEHOLDERS.pop(name, None)
        if placeholder is not None:
            placeholder._destroy()  # type: ignore[no-untyped-call]
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        return function

    return register


def _imports_first(name: str) -> Callable[..., Any]:
    packet, _, overload = name.partition(".")

    def run(*arguments: Any) -> Any:
        import_module(_IMPLEMENTED_IN[packet])
        return getattr(getattr(torch.ops.cpattn, packet), overload or "default")(*arguments)

    return run


for _name in SCHEMAS:
    # A library of its own for each, which can be taken back: torch has one function for an operator.
    _PLACEHOLDERS[_name] = torch.library.Library("cpattn", "IMPL")  # type: ignore[no-untyped-call]
    _PLACEHOLDERS[_name].impl(_name, _imports_first(_name), "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]


def _fake(name: str) -> Callable[[F], F]:
    def register(function: F) -> F:
        torch.library.register_fake(f"cpattn::{name}", function, lib=_LIBRARY)
        return function

    return register


# These are of any arguments, also of those that the operator refuses.


@_fake("attention")
@_fake("attention.packed")
def _attention_shapes(
    q: Tensor, k: Tensor, v: Tensor | None, meta: Tensor | None, order: Any, group: Any, options: str, sinks: Any, out: Any, *_: Any
) -> tuple[Tensor, Tensor]:
    _refuse_export(meta)
    return _results(q, width_of(k if v is None else v), options, out)


@_fake("attention.paged")
def _attention_over_pages_shapes(*given: Any) -> tuple[Tensor, Tensor]:
    *call, _, _, _, cache = given
    _refuse_export(cache)
    return _attention_shapes(*call)


@_fake("attend")
def _attend_shapes(
    q: Tensor, meta: Tensor | None, order: Any, group: Any, options: str, sinks: Any, out: Any, *pages: Any
) -> tuple[Tensor, Tensor]:
    *_, cache, v_head_dim = pages
    _refuse_export(meta, cache)
    return _results(q, v_head_dim, options, out)


def width_of(x: Tensor) -> int:
    """The size of the last axis; 0 where there is none."""
    return x.shape[-1] if x.ndim else 0


def _results(q: Tensor, v_head_dim: int, options: str, out: Tensor | None) -> tuple[Tensor, Tensor]:
    """``out [rows, Hq, Dv]``, empty where the caller has given the memory for it, and ``lse [rows, Hq]``, empty where it is not
    asked for."""
    asked = parse_options(options)
    width = v_head_dim if asked.v_dim is None else max(asked.v_dim, 0)
    result = q.new_empty(*q.shape[:-1], width) if out is None else q.new_empty(0)
    return result, q.new_empty(q.shape[:-1] if asked.return_lse else 0, dtype=torch.float32)


@_fake("write")
def _write_nothing(*given: Any) -> None:
    *_, cache = given
    _refuse_export(cache)


@_fake("token_mask")
def _nothing(*_: Any) -> None:
    """Nothing is returned."""


@_fake("shard")
def _shard_shape(x: Tensor, meta: Tensor, rows: int, dim: int) -> Tensor:
    _refuse_export(meta)
    shape = list(x.shape)
    if -x.ndim <= dim < x.ndim:
        shape[dim] = rows
    return x.new_empty(shape)


@_fake("unshard")
def _unshard_shape(x: Tensor, meta: Tensor, order: Any, group: Any, rows: int, options: str) -> Tensor:
    _refuse_export(meta)
    return x.new_empty(rows, *x.shape[1:])


@_fake("table")
def _table_shape(meta: Tensor, name: str, size: int, device: torch.device) -> Tensor:
    _refuse_export(meta)
    return torch.empty(size, dtype=torch.int64 if name == "position_ids" else torch.int32, device=device)


def _refuse_export(*handles: Tensor | None) -> None:
    if any(handle is not None for handle in handles) and is_exporting():
        raise UnsupportedError(NOT_EXPORTED)
