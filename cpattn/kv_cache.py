"""Where the prefix lies: the keys and values of tokens that earlier calls have computed."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cpattn.device_tables import IntArray
from cpattn.handles import new_handle
from cpattn.stored import ScaleKind


class _InGraphs:
    """How a compiled graph takes a PagedKV. These are no fields: a cache of the same fields has others."""

    __slots__ = ("handle", "is_of_graph", "written")
    handle: Tensor | None
    is_of_graph: bool
    written: tuple[Tensor, Tensor | None]


@dataclass(frozen=True, eq=False, repr=False)
class PackedKV:
    """The prefix of every request, request after request, without padding; the same on every rank. It is only read.

    >>> import cpattn, torch
    >>> cache = cpattn.PackedKV(torch.randn(64, 2, 8), torch.randn(64, 2, 8))  # the 64 cached tokens of one request, say
    >>> meta = cpattn.build_metadata([(64, 3), (0, 2)], cp_size=1, cp_rank=0)
    >>> q, k = torch.randn(5, 4, 8), torch.randn(5, 2, 8)
    >>> cpattn.cp_attention(q, k, k, meta, kv_cache=cache).shape
    torch.Size([5, 4, 8])

    Attributes:
        k: ``[sum of prefix_len, Hkv, D]``, already rotated, as all keys; of the new keys' dtype and device.
        v: ``[sum of prefix_len, Hkv, Dv]``, or None where V is the first columns of K.
    """

    k: Tensor
    v: Tensor | None

    def __repr__(self) -> str:
        return f"PackedKV({_sizes('{} tokens, {} heads', self.k, self.v)})"


@dataclass(frozen=True, eq=False)
class TableLines:
    """What is known on the host of the lines of a page table.

    Attributes:
        tokens: int64 ``[lines, holders]``: of how many tokens of its request each line has the pages, new ones included, on each
            rank of a sharded cache. One holder stands for all ranks of a replicated one.
        sharded: whether each rank has pages of its own tokens alone, or of all.
        owner: the rule by which tokens lie on ranks, as of :func:`cpattn.plan`.
    """

    tokens: IntArray
    sharded: bool
    owner: Hashable = None


@dataclass(frozen=True, eq=False, repr=False)
class PagedKV(_InGraphs):
    """A view of an engine's own pages: the prefix is read from them, and this call's keys and values are written to them.

    Token ``t`` that is held of request ``i`` lies in page ``page_table[i, t // page_size]`` at ``t % page_size``. Where every
    rank holds everything, t is the token's absolute position. Where the plan says that the cache is sharded
    (``prefix_shards``, ``prefix_ranks`` or ``owner``), each rank has pages of its own. Then t counts the tokens that this rank holds of the
    request, in the order of the sequence, new ones included.

    >>> import cpattn, torch
    >>> pages = torch.zeros(8, 16, 2, 64)
    >>> cache = cpattn.PagedKV(pages, pages.clone(), torch.tensor([[5, 2, 7]], dtype=torch.int32))
    >>> cache.page_size
    16

    >>> fp8, half = pages.to(torch.float8_e4m3fn), torch.tensor(0.5)
    >>> cpattn.PagedKV(fp8, fp8.clone(), cache.page_table, k_scale=half, v_scale=half).scales
    'head'

    A compiled graph knows which pages its calls write, and keeps what else it does with their memory in order. Where K and V are views of
    one tensor, a PagedKV takes several times as long to make, for the sake of such graphs: make it once for a layer and a batch.

    Attributes:
        k_pages: ``[num_pages, page_size, Hkv, D]`` on the new keys' device, any page_size from 1, any strides but a contiguous last
            axis. Of the new keys' dtype; or bf16 or fp16 whatever that is; or ``float8_e4m3fn`` or ``float8_e5m2``, with scales. New
            keys and values are converted once, and all queries see what they are in the pages, in q's dtype.
        v_pages: ``[num_pages, page_size, Hkv, Dv]``, or None where V is the first columns of K (MLA). K and V may be views of
            one tensor, as long as no element is in both.
        page_table: int32 or int64 ``[num_requests, max_pages]``; what lies beyond a request's pages is not looked at.
            Requests may share pages that they only read; a slot that a call writes must be no other token's.
            One tensor for all layers of a batch spares the host a little work in each.
        k_scale, v_scale: of pages in fp8, what their numbers are to be multiplied by, fp32 on the pages' device: one number ``[]`` or
            ``[1]``; one a KV head, ``[Hkv]``; or one a token and head, ``[num_pages, page_size, Hkv]``, which calls write beside the
            pages. The first two are the same on every rank. v_scale is None where v_pages is.
        lines: what a KVPool knows of its own table, so that a plan that does not go with it is refused; else None.
        handle: by which operators in compiled graphs refer to this cache: int64 without an axis, on the CPU. None where they need none.
        is_of_graph: whether a graph itself makes the cache.
        written: what operators in compiled graphs write to: k_pages and v_pages, or views of them; where K and V share memory, all of it
            from their first element to their last, ``[elements]``, and None.
    """

    k_pages: Tensor
    v_pages: Tensor | None
    page_table: Tensor
    lines: TableLines | None = None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    def __post_init__(self) -> None:
        # Dynamo's tensors have no memory yet, and those of torch.export are of other classes. What another thread traces does not matter.
        is_of_graph = torch.compiler.is_dynamo_compiling() or not _is_plain(self.k_pages)
        written = (self.k_pages, self.v_pages) if is_of_graph else _as_written(self.k_pages, self.v_pages)
        object.__setattr__(self, "is_of_graph", is_of_graph)
        object.__setattr__(self, "written", written)
        shares_memory = written[1] is None and self.v_pages is not None
        needs_handle = not is_of_graph and (shares_memory or self.lines is not None)
        object.__setattr__(self, "handle", new_handle(self) if needs_handle else None)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy has a handle of its own."""
        return type(self), (self.k_pages, self.v_pages, self.page_table, self.lines, self.k_scale, self.v_scale)

    def __repr__(self) -> str:
        table = self.page_table
        form = f"{tuple(table.shape)} {table.dtype}" if isinstance(table, Tensor) else type(table).__name__
        return f"PagedKV({_sizes('{} pages of {} tokens, {} heads', self.k_pages, self.v_pages)}, table {form})"

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.k_pages.shape[1]

    @property
    def scales(self) -> ScaleKind | None:
        """What a scale belongs to: ``"head"`` (or all heads), ``"token"`` (and head), or None where there is none."""
        return None if self.k_scale is None else "token" if self.k_scale.ndim == 3 else "head"


def cached_heads(cache: PackedKV | PagedKV | None) -> int | None:
    """The KV heads of a cache, if there is one."""
    if cache is None:
        return None
    return int((cache.k_pages if isinstance(cache, PagedKV) else cache.k).shape[-2])


def _is_plain(x: Any) -> bool:
    return type(x) is Tensor or issubclass(type(x), nn.Parameter)


def _as_written(k: Tensor, v: Any) -> tuple[Tensor, Any]:
    """What operators write to, so that torch's own compiler (2.13) copies no pages that it need not, and none to the wrong place.

    Of two arguments in one storage it copies one each time. A copy that it makes of an argument with a storage offset goes astray in
    graphs of dynamic sizes. It makes that only where the graph uses the same tensor besides: of another view it finds the base.
    """
    try:
        if not _is_plain(v):
            return _itself_or_view(k), v
        is_shared = k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr() and k.dtype == v.dtype
        if not (is_shared and k.numel() and v.numel()):
            return _itself_or_view(k), _itself_or_view(v)
        first = min(k.storage_offset(), v.storage_offset())
        return k.as_strided((max(_last_element(k), _last_element(v)) + 1 - first,), (1,), first), None
    except RuntimeError:  # torch's, for tensors that are no plain memory. Calls refuse them.
        return k, v


def _itself_or_view(x: Tensor) -> Tensor:
    """A view of what has a storage offset, else the tensor itself."""
    return x.view(x.shape) if x.storage_offset() else x


def _last_element(x: Tensor) -> int:
    if x.is_contiguous():
        return int(x.storage_offset()) + x.numel() - 1
    return int(x.storage_offset()) + sum([(size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)])


def _sizes(form: str, k: Any, v: Any) -> str:
    """The shapes of K and V without their numbers; whatever the two are, as a repr must not raise."""
    if not isinstance(k, Tensor) or k.ndim != form.count("{}") + 1:
        return f"k: {_kind(k)}, v: {_kind(v)}"
    v_head_dim = "in k" if v is None else v.shape[-1] if isinstance(v, Tensor) and v.ndim == k.ndim else _kind(v)
    return f"{form.format(*k.shape)}, k {k.shape[-1]}, v {v_head_dim}, {k.dtype}, {k.device}"


def _kind(x: Any) -> str:
    return str(tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__
