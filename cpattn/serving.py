"""The pieces of ``cp_attention`` over pages, for engines that write their cache or attend themselves.

``cp_attention(q, k, v, meta, kv_cache=PagedKV(...))`` is ``gather_kv``, ``write_kv`` and ``attend`` one after another; an
engine can put its own code in the place of any of them.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from cpattn.call import checks
from cpattn.call.agreed import describe, refusal_of, validated
from cpattn.call.arguments import Arguments, BackendChoice
from cpattn.call.find import find_call
from cpattn.call.forward_context import ForwardContext, current_context
from cpattn.call.in_graph import (
    attend_in_graph,
    cache_as_given,
    cache_fits,
    cache_handle,
    enters_graph,
    group_of,
    is_plain,
    is_traced,
    order,
    pages_in_graph,
    results_of,
)
from cpattn.call.other_words import refuse_words
from cpattn.call.page_checks import check_page_table, check_write, parse_page_size
from cpattn.call.page_contents import check_slot_pages, check_slots
from cpattn.call.prepared import PreparedCall
from cpattn.call.stored_contents import check_fits, check_scales_of_heads
from cpattn.errors import UnsupportedError
from cpattn.exchange.gathered_rows import GatheredRows, gathered_rows
from cpattn.exchange.helix import RESIDENT_HELIX
from cpattn.exchange.message import KVFormat
from cpattn.exchange.new_rows import stored_parts
from cpattn.exchange.page_rows import write_slots
from cpattn.exchange.resident import RESIDENT
from cpattn.exchange.resident_shards import RESIDENT_SHARDS
from cpattn.graphs import has_operator, leaves_graph
from cpattn.handles import resolve
from cpattn.kv_cache import PagedKV
from cpattn.metadata.cp_metadata import CPMetadata
from cpattn.metadata.striped_places import kept_places, owned_places
from cpattn.ops import implements, parse_options
from cpattn.stored import is_fp8
from cpattn.transports.groups import Group, as_transport
from cpattn.transports.in_flight import InFlight
from cpattn.transports.transfer import Transfer

# What attend takes by keyword.
_ATTEND_KEYWORDS = ("group", "v_dim", "backend", "scale", "window", "softcap", "sinks", "out", "return_lse", "check")


@leaves_graph
def gather_kv(
    k: Tensor, v: Tensor | None, meta: CPMetadata, *, group: Group = None, check: bool = False, label: str | None = None
) -> tuple[Tensor, Tensor | None]:
    """Every rank's new keys and values, in rank-major order, on every rank. A collective call.

    >>> import cpattn, torch
    >>> meta = cpattn.build_metadata([(0, 3)], cp_size=1, cp_rank=0)
    >>> k, v = cpattn.gather_kv(torch.randn(3, 2, 8), torch.randn(3, 2, 8), meta)
    >>> k.shape
    torch.Size([3, 2, 8])

    Args:
        k: ``[meta.rows, Hkv, D]``; v ``[meta.rows, Hkv, Dv]``, or None where V is a part of K.
        meta: this rank's metadata.
        group, check, label: as in :func:`cp_attention`.

    Returns:
        ``[cp_size * rows, Hkv, D]`` and ``[cp_size * rows, Hkv, Dv]`` (or None), zeros on padding: views of memory that
        the next call over this group uses again. Row ``meta.restore_index[t]`` is token t; :func:`slot_mapping` says where
        each row belongs.

    Raises:
        CPError: in its subclasses, before anything is sent.
        GroupError: also in the middle of a call, where a transfer fails; every later call on the group raises it as well.
        DisagreementError: with ``check``, where the ranks' plans or arguments differ, or another rank failed.

    Of a rank that fails in the middle of the call, K arrives as NaN and V as 0.
    """
    checks.check_metadata(meta)
    transport = as_transport(group, meta.plan.cp_size)

    def validate() -> KVFormat:
        checks.check_group(meta, transport)
        if meta.plan.all_queries:
            raise UnsupportedError(
                "the plan has queries='all', so that each rank has all rows: nothing is to be gathered; write_kv takes k and v as they "
                "are, with the slots of slot_mapping"
            )
        checks.check_kv(k, v, meta)
        v_head_dim = k.shape[2] if v is None else v.shape[2]
        # A caller's fp8 travels as bytes.
        dtype = torch.uint8 if is_fp8(k.dtype) else k.dtype
        return KVFormat(k.shape[1], k.shape[2], v_head_dim, v is None, dtype, k.device)

    def describe(kv: KVFormat) -> str:
        return f"gather_kv, {kv.heads} heads of {kv.head_dim}/{kv.v_head_dim}, {kv.dtype}, rows={meta.rows}, bucket={meta.bucket}"

    with InFlight(transport, meta.device) as in_flight:
        kv = validated(validate, describe, meta.plan, in_flight, check, label)

        made: list[GatheredRows] = []

        def make() -> list[Transfer]:
            made[:] = gathered_rows(transport, kv, meta.rows)
            return [rows.transfer for rows in made] if meta.rows else []

        in_flight.expect(make)
        (rows,) = made
        if meta.rows:
            new_k, new_v = k.view(kv.dtype) if is_fp8(k.dtype) else k, v if v is None or not is_fp8(v.dtype) else v.view(kv.dtype)
            rows.put(new_k, new_v, meta.num_tokens if meta.bucket is None else meta.token_count)
            in_flight.start().wait()
        all_k, all_v = rows.all.parts
        return all_k.view(k.dtype), None if all_v is None else all_v.view(k.dtype)


@leaves_graph
def slot_mapping(meta: CPMetadata, page_table: Tensor, page_size: int, *, check: bool = False) -> Tensor:
    """The slot of each row of the gathered buffer: ``page * page_size + place in the page``, -1 on padding.

    Where the plan has ``prefix_shards`` or ``prefix_ranks`` a rank writes its own rows alone, and the slots are those of its local
    rows. With an ``owner`` the slots of rows that other ranks hold are -1. Made on the device, without waiting for it.

    >>> import cpattn, torch
    >>> meta = cpattn.build_metadata([(3, 2)], cp_size=2, cp_rank=0, pad_to=2)
    >>> cpattn.slot_mapping(meta, torch.tensor([[7, 5]], dtype=torch.int32), page_size=4)
    tensor([31, -1, 20, -1])

    Args:
        page_table: int32 or int64 ``[num_requests, max_pages]``.
        page_size: tokens of a page.
        check: look at the table on a GPU as well, which waits for it; on the CPU it is looked at in every call.

    Returns:
        int64 ``[cp_size * rows]``; ``[rows]`` where the plan has ``prefix_shards`` or ``prefix_ranks``, or each rank has all rows
        (``queries="all"``).

    Raises:
        PageTableError: the table is too narrow, or page_size is no positive integer. Where the table is looked at: a negative page
            for a new token, or one slot for two tokens.
        TensorMismatchError: the table is on another device than the metadata.
    """
    checks.check_metadata(meta)
    page_size = parse_page_size(page_size)
    check_page_table(page_table, page_size, meta)
    if check or page_table.device.type == "cpu":
        check_slot_pages(page_table, page_size, meta)
    request, position = (place.long() for place in _written_places(meta))
    is_token = position >= 0
    if not page_table.numel():
        return torch.full_like(position, -1)
    page = page_table[request.clamp(min=0), position.clamp(min=0) // page_size].long()
    return torch.where(is_token, page * page_size + position % page_size, -1)


def _written_places(meta: CPMetadata) -> tuple[Tensor, Tensor]:
    if meta.plan.all_queries:
        return kept_places(meta)
    if meta.plan.owner is not None:
        return owned_places(meta)
    return meta.held_places if meta.plan.sharded else meta.gathered_places


@has_operator
def write_kv(k: Tensor, v: Tensor | None, kv_cache: PagedKV, slots: Tensor, *, check: bool = False) -> None:
    """Writes row i of k and v into slot ``slots[i]`` of the pages; rows of a negative slot are skipped.

    >>> import cpattn, torch
    >>> cache = cpattn.PagedKV(torch.zeros(4, 2, 1, 8), torch.zeros(4, 2, 1, 8), torch.tensor([[3]], dtype=torch.int32))
    >>> cpattn.write_kv(torch.ones(2, 1, 8), torch.ones(2, 1, 8), cache, torch.tensor([7, -1]))
    >>> cache.k_pages.sum(dim=(2, 3)).tolist()
    [[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 8.0]]

    Args:
        k: ``[n, Hkv, D]``; v ``[n, Hkv, Dv]``, or None where the cache has no v_pages. In another dtype than the pages they are
            converted as :func:`cp_attention` does it. In that of fp8 pages they are written as they are, if heads have scales.
        kv_cache: its pages are written, and scales of tokens; its page table is not looked at.
        slots: int32 or int64 ``[n]``, no slot twice.
        check: look at the slots on a GPU as well, which waits for it; on the CPU they are looked at in every call.

    Raises:
        TensorMismatchError: k, v, pages and slots do not go together.
        PageTableError: pages that cannot be written: of the wrong form, or an expanded view. Where the slots are looked at: a slot
            twice, or beyond the pages; K and V pages with an element in common. With them a number is looked for that the pages
            cannot hold, which raises TensorMismatchError.
        CPError: in its other subclasses, for what is no PagedKV or needs a gradient.
    """
    if (
        is_traced()
        and isinstance(kv_cache, PagedKV)
        and cache_fits(kv_cache)
        and isinstance(check, bool)
        and all(isinstance(x, Tensor) for x in (k, slots))
        and is_plain(k, v, slots, kv_cache.k_pages, kv_cache.v_pages)
    ):
        torch.ops.cpattn.write.default(k, v, slots, check, order(), *pages_in_graph(kv_cache), cache_handle(kv_cache))
        return
    _write(k, v, kv_cache, slots, check)


@leaves_graph
def _write(k: Tensor, v: Tensor | None, kv_cache: PagedKV, slots: Tensor, check: bool) -> None:
    check_write(k, v, kv_cache, slots)
    if check or slots.device.type == "cpu":
        check_slots(kv_cache, slots)
        check_scales_of_heads(kv_cache)
    kv = KVFormat.of_pages(kv_cache)
    if k.dtype == kv.dtype:
        if kv.as_bytes:
            k, v = k.view(torch.uint8), None if v is None else v.view(torch.uint8)
    else:
        if check or not k.is_cuda:
            written = slots >= 0
            check_fits(k[written], None if v is None else v[written], kv_cache)
        k, v = stored_parts(kv, kv_cache, k, v)
    write_slots(kv, kv_cache, slots, k, v)


@implements("write")
def _write_operator(k: Tensor, v: Tensor | None, slots: Tensor, check: bool, order: Tensor | None, *cache: Any) -> None:
    k_pages, v_pages, handle = cache
    _write(k, v, cache_as_given(k_pages, v_pages, None, handle), slots, check)


@overload
def attend(
    q: Tensor,
    kv_cache: PagedKV,
    meta: CPMetadata | None,
    *,
    group: Group = ...,
    v_dim: int | None = ...,
    backend: BackendChoice = ...,
    scale: float | None = ...,
    window: int | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    out: Tensor | None = ...,
    return_lse: Literal[False] = ...,
    check: bool = ...,
) -> Tensor: ...


@overload
def attend(
    q: Tensor,
    kv_cache: PagedKV,
    meta: CPMetadata | None,
    *,
    group: Group = ...,
    v_dim: int | None = ...,
    backend: BackendChoice = ...,
    scale: float | None = ...,
    window: int | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    out: Tensor | None = ...,
    return_lse: Literal[True],
    check: bool = ...,
) -> tuple[Tensor, Tensor]: ...


@has_operator
def attend(
    q: Tensor,
    kv_cache: PagedKV,
    meta: CPMetadata | None,
    *,
    group: Group = None,
    v_dim: int | None = None,
    backend: BackendChoice = "auto",
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
    return_lse: bool = False,
    check: bool = False,
    **unknown: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """This rank's queries over pages that hold everything already, this call's tokens included. Writes nothing.

    Over pages that this rank has whole it sends nothing. Over a sharded cache it is a collective call: queries go to all ranks, and
    partial results come back.

    >>> import cpattn, torch
    >>> meta = cpattn.build_metadata([(2, 1)], cp_size=1, cp_rank=0)
    >>> pages = torch.randn(4, 16, 2, 8)
    >>> cache = cpattn.PagedKV(pages, pages, torch.tensor([[2]], dtype=torch.int32))
    >>> cpattn.attend(torch.randn(1, 4, 8), cache, meta).shape
    torch.Size([1, 4, 8])

    Args:
        q: ``[meta.rows, Hq, D]``. In ``float8_e4m3fn`` it is for ``backend="flash_attn3"`` alone, over whole pages in that dtype with one
            scale or one a head; its own scale goes into ``scale``, and the result is in bf16.
        meta: this rank's metadata, or None within a :func:`cpattn.forward_context`.
        kv_cache: its pages are only read, so that requests may share them, and K and V may be one; the rest as in
            :func:`cp_attention`. In a striped cache a long chunk of new tokens is cut where its rank's turn begins: of small
            interleaves :func:`cp_attention` is faster, which has the new keys at hand. With a window over a sharded cache each
            query is looked at by itself, over a copy of what windows reach.
        group: of a sharded cache, as in :func:`cp_attention`; else it is not looked at.
        check: look at the numbers in the page table on a GPU as well, which waits for it; on the CPU they are looked at in every
            call. A few rows of what a caller's own kernel returns are compared with the reference. Of a sharded cache all ranks
            compare plan and arguments first; else no other rank is asked.

    Returns:
        As :func:`cp_attention`.

    Raises:
        CPError: in its subclasses, before anything is computed. A window over shards whose positions the plan does not know is one of
            those: with ``prefix_shards``. The rest as in :func:`cp_attention`.
        GroupError: over a sharded cache also in the middle of a call, as in :func:`cp_attention`.
        BackendError: after the launch, where a caller's kernel returns what is no result, or, with ``check``, a wrong one.
    """
    arguments = Arguments(q, None, None, v_dim, kv_cache, RESIDENT, backend, None, scale, window, softcap, sinks, out)
    if enters_graph(meta):
        results = attend_in_graph(arguments, meta, group, {"return_lse": return_lse, "check": check, **unknown})
        if results is not NotImplemented:
            return results  # type: ignore[no-any-return]
    if unknown:
        refuse_words("attend", unknown, _ATTEND_KEYWORDS)
    result, lse = _attend(arguments, meta, group, return_lse, check)
    return result if lse is None else (result, lse)


@leaves_graph
def _attend(arguments: Arguments, meta: CPMetadata | None, group: Group, return_lse: bool, check: bool) -> tuple[Tensor, Tensor | None]:
    context: ForwardContext | None = None
    if meta is None:
        context = current_context()
        arguments, meta = context.complete(arguments), context.meta
        group, check = context.group if group is None else group, check or context.check
    checks.check_metadata(meta)
    is_sharded = meta.plan.sharded
    # Any one rank can do this alone where it has everything.
    transport = as_transport(group, meta.plan.cp_size) if is_sharded else as_transport(None, 1)
    if is_sharded:
        arguments = arguments._replace(strategy=RESIDENT_HELIX if meta.plan.all_queries else RESIDENT_SHARDS)
    problems: list[str] = []

    def find() -> PreparedCall:
        return find_call(arguments, meta, transport, check=check)

    with InFlight(transport, meta.device) as in_flight:
        call = validated(find, lambda call: describe(call, meta, arguments.kv_cache), meta.plan, in_flight, check and is_sharded, None)
        if check:
            in_flight.expect(call.transfers)
            result, lse = call.run(arguments, in_flight, problems)
        else:
            result, lse = call.make(arguments, meta, in_flight)
    refusal = refusal_of(problems)
    if refusal is not None:
        raise refusal
    if context is not None:
        context.calls += 1
    return result, call.lse_of(result, lse) if return_lse else None


@implements("attend")
def _attend_operator(
    q: Tensor,
    meta: Tensor | None,
    order: Tensor | None,
    group: Tensor | None,
    options: str,
    sinks: Tensor | None,
    out: Tensor | None,
    *given: Any,
) -> tuple[Tensor, Tensor]:
    k_pages, v_pages, page_table, handle, _ = given
    cache, asked = cache_as_given(k_pages, v_pages, page_table, handle), parse_options(options)
    arguments = Arguments(
        q, None, None, asked.v_dim, cache, RESIDENT, asked.backend, None, asked.scale, asked.window, asked.softcap, sinks, out
    )
    known, in_group = None if meta is None else resolve(meta, CPMetadata), group_of(group, asked.group_name)
    result, lse = _attend(arguments, known, in_group, asked.return_lse, asked.check)
    return results_of(result, lse, out)
