"""Calls as a compiled graph holds them: from arguments to operators, and back to arguments where the operator runs.

The first half is traced by Dynamo, and kept to what it can trace. It checks nothing but whether the operator can take the
arguments at all.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from cpattn.call.arguments import Arguments
from cpattn.errors import UnsupportedError
from cpattn.graphs import is_exporting
from cpattn.handles import resolve
from cpattn.kv_cache import PackedKV, PagedKV
from cpattn.metadata.cp_metadata import CPMetadata
from cpattn.ops import ORDER, options_text, width_of
from cpattn.transports.groups import Group
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
    q, k, v, v_dim, cache, strategy, backend, overlap, scale, window, softcap, sinks, _ = arguments
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
        pages = cache.k_pages, cache.v_pages, cache.page_table
        if cache.handle is None:
            return operators.attention.paged(*given, *pages)
        return operators.attention.cache(*given, cache.handle, *pages)

    return _results(call, arguments, width_of(k if v is None else v), more["return_lse"])


def attend_in_graph(arguments: Arguments, meta: CPMetadata | None, more: dict[str, Any]) -> Any:
    """What ``attend`` returns for these arguments, from its operator; NotImplemented where that cannot take them.

    Args:
        more: return_lse, check, and whatever else was given by keyword.
    """
    q, _, _, v_dim, cache, _, backend, _, scale, window, softcap, sinks, _ = arguments
    if not (_fits(arguments, meta) and isinstance(cache, PagedKV) and are_options(more)):
        return NotImplemented
    options: dict[str, Any] = {"v_dim": v_dim, "backend": backend, "scale": scale, "window": window, "softcap": softcap, **more}
    text, handle = options_text(options), None if meta is None else meta.handle
    k_pages, v_pages, page_table = cache.k_pages, cache.v_pages, cache.page_table

    def call(out: Tensor | None) -> Any:
        return torch.ops.cpattn.attend.default(q, handle, order(), text, sinks, out, k_pages, v_pages, page_table, cache.handle)

    return _results(call, arguments, width_of(k_pages if v_pages is None else v_pages), more["return_lse"])


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
    """Whether operators take a cache: by its handle. One that the graph itself has made has none; exported programs make it."""
    return isinstance(cache, (PagedKV, PackedKV)) and (cache.handle is not None or is_exporting())


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
    """The group of a call again, where the operator runs."""
    if name is not None:
        # torch's own graphs name groups in this way, in all releases from 2.9 on.
        group: dist.ProcessGroup = dist.distributed_c10d._resolve_process_group(name)  # type: ignore
        return group
    if handle is None:
        return None
    return resolve(handle, Transport)


def cache_in_memory(handle: Tensor, k_pages: Tensor, v_pages: Tensor | None) -> PagedKV:
    """The cache that an operator is to write to, given what its graph takes for the pages. Raises CPError where those are others."""
    cache = resolve(handle, PagedKV)
    if not (_is_same(k_pages, cache.k_pages) and _is_same(v_pages, cache.v_pages)):
        raise UnsupportedError(
            f"the compiled graph has written to a copy of the pages {tuple(k_pages.shape)} before this call, and would lose what the call "
            "writes to the pages themselves; end the graph between the two: torch._dynamo.graph_break() before the call, or "
            "torch.compiler.disable() around what else writes to pages. attend can follow such writes in one graph"
        )
    return cache


def _is_same(x: Tensor | None, other: Tensor | None) -> bool:
    if x is None or other is None:
        return x is other
    return x is other or (x.data_ptr() == other.data_ptr() and x.shape == other.shape)


def cache_as_given(handle: Tensor | None, k_pages: Tensor, v_pages: Tensor | None, page_table: Tensor) -> PagedKV:
    """The cache that an operator reads: where its graph has written to a copy of the pages or of the table, that copy."""
    if handle is None:
        return PagedKV(k_pages, v_pages, page_table)
    cache = resolve(handle, PagedKV)
    if _is_same(k_pages, cache.k_pages) and _is_same(v_pages, cache.v_pages) and _is_same(page_table, cache.page_table):
        return cache
    return PagedKV(k_pages, v_pages, page_table, cache.lines)


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
