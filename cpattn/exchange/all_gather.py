"""Strategy ``all_gather``: every rank receives all K and V, puts them in order, and computes in one launch.

With pages their order is that of the pages: what is gathered is written to its slots, and attended to there.
With ``overlap`` above 1 this is done for so many groups of KV heads, one after another: all their transfers are started
at once, and the attention of the first group runs while the next is in flight.
"""

from __future__ import annotations

from torch import Tensor

from cpattn.attention.rows import Alignment
from cpattn.exchange.communicator import Communicator, Work
from cpattn.exchange.message import KVFormat, gather_rows_, message_buffer, pack_
from cpattn.exchange.own_keys import own_rows
from cpattn.exchange.pages import read_pages_, write_pages_
from cpattn.exchange.step_rows import causal_rows
from cpattn.exchange.strategy import ExchangeInputs, Step, Steps, Strategy
from cpattn.kv_cache import PackedKV, PagedKV
from cpattn.metadata.cp_metadata import CPMetadata
from cpattn.metadata.plan import Plan


def _steps(inputs: ExchangeInputs, meta: CPMetadata, communicator: Communicator) -> Steps:
    cache = inputs.cache
    if meta.plan.cp_size == 1 and cache is None:
        yield Step(*own_rows(inputs, meta, communicator), [causal_rows(meta, paged=False)])
        return
    groups = inputs.overlap
    kv = inputs.format._replace(heads=inputs.format.heads // groups)
    group_heads = [slice(group * kv.heads, (group + 1) * kv.heads) for group in range(groups)]
    # Group after group, so that each is one message: [groups, rows of all ranks, heads of a group, width].
    shape = (groups, meta.plan.cp_size * meta.rows, kv.heads, kv.width)
    all_gathered = communicator.buffer("gathered", shape, kv.dtype, kv.device).unbind(0)
    gathers = [
        start_gather(gathered, inputs.k[:, heads], None if inputs.v is None else inputs.v[:, heads], meta, communicator)
        for gathered, heads in zip(all_gathered, group_heads, strict=True)
    ]
    for group, (gathered, heads, gather) in enumerate(zip(all_gathered, group_heads, gathers, strict=True)):
        if isinstance(cache, PackedKV):
            # One group's keys in order at a time: its attention has read them before the next group's take their place.
            ordered = message_buffer(communicator, "ordered", kv, meta.plan.num_tokens + meta.plan.num_prefix_tokens)
            prefix_v = None if cache.v is None else cache.v[:, heads]
            pack_(ordered, cache.k[:, heads], prefix_v, cache.k.shape[0], meta.prefix_key_rows)
        gather.wait()
        query_heads = inputs.q.shape[1] // groups
        step_heads = None if groups == 1 else slice(group * query_heads, (group + 1) * query_heads)
        if isinstance(cache, PagedKV):
            pages = PagedKV(cache.k_pages[:, :, heads], None if cache.v_pages is None else cache.v_pages[:, :, heads], cache.page_table)
            write_pages_(pages.k_pages, pages.v_pages, pages.page_table, *meta.gathered_places, *kv.parts(gathered))
            yield over_pages(pages, kv, inputs.reads_pages, meta, communicator, step_heads)
            continue
        if cache is None:
            ordered = message_buffer(communicator, "ordered", kv, len(meta.restore_index))
        # From rank-major order to each request's prefix and extend in one piece, K and V at once.
        gather_rows_(ordered, gathered, meta.restore_index, None if cache is None else meta.extend_key_rows)
        yield Step(*kv.split(ordered), [causal_rows(meta, paged=False)], step_heads)


def start_gather(gathered: Tensor, k: Tensor, v: Tensor | None, meta: CPMetadata, communicator: Communicator) -> Work:
    """Starts to bring every rank's K and V into ``gathered`` ``[cp_size * rows, Hkv, width]``, rank after rank."""
    # The message is packed where the gather would put it, which spares a copy of it.
    message = gathered[meta.cp_rank * meta.rows :][: meta.rows]
    pack_(message, k, v, meta.num_tokens if meta.bucket is None else meta.token_count)
    return communicator.all_gather(gathered, message)


def over_pages(
    pages: PagedKV, kv: KVFormat, reads_pages: bool, meta: CPMetadata, communicator: Communicator, heads: slice | None = None
) -> Step:
    """All keys where they lie in the pages, or a copy of them in order for a backend that can not read those."""
    if reads_pages:
        return Step(*kv.pair(pages.k_pages, pages.v_pages), [causal_rows(meta, paged=True).with_pages(pages.page_table)], heads)
    ordered = message_buffer(communicator, "ordered", kv, meta.plan.num_tokens + meta.plan.num_prefix_tokens)
    read_pages_(pages.k_pages, pages.v_pages, pages.page_table, *meta.key_places, *kv.parts(ordered))
    return Step(*kv.split(ordered), [causal_rows(meta, paged=False)], heads)


def _why_not(meta: CPMetadata, cache: PackedKV | PagedKV | None, window: int | None) -> str | None:
    if meta.plan.sharded:
        return "it would bring the whole of a sharded cache to every rank"
    return None


def _alignments(plan: Plan, window: int | None, fixed: bool = False) -> frozenset[Alignment]:
    return frozenset({"bottom_right"})


ALL_GATHER = Strategy(
    name="all_gather",
    steps=_steps,
    num_steps=lambda plan, window, fixed=False: 1,
    alignments=_alignments,
    why_not=_why_not,
)
