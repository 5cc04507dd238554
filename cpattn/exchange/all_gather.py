"""Strategy ``all_gather``: every rank receives all K and V, puts them in order, and computes in one launch.

With ``overlap`` above 1 this is done for so many groups of KV heads, one after another: all their transfers are started
at once, and the attention of the first group runs while the next is in flight.
"""

from __future__ import annotations

from collections.abc import Iterator

from cpattn.attention.rows import RaggedRows
from cpattn.exchange.communicator import Communicator
from cpattn.exchange.message import gather_rows_, pack_, unpack
from cpattn.exchange.strategy import ExchangeInputs, Step, Strategy
from cpattn.metadata.cp_metadata import CPMetadata


def _steps(inputs: ExchangeInputs, meta: CPMetadata, communicator: Communicator) -> Iterator[Step]:
    prefix = inputs.prefix
    rows = meta.derive("all_gather rows", lambda: _rows(meta))
    cp_size = meta.plan.cp_size
    if cp_size == 1 and prefix is None:
        yield Step(inputs.k[: meta.num_tokens], inputs.v[: meta.num_tokens], rows)
        return
    groups = inputs.overlap
    kv_heads, head_dim = inputs.k.shape[1] // groups, inputs.k.shape[2]
    group_heads = [slice(group * kv_heads, (group + 1) * kv_heads) for group in range(groups)]
    # Group after group, so that each is one message: [groups, rows of all ranks, heads of a group, D + Dv].
    width = head_dim + inputs.v.shape[2]
    shape = (groups, cp_size * meta.rows, kv_heads, width)
    all_gathered = communicator.buffer("gathered", shape, inputs.k.dtype, inputs.k.device).unbind(0)
    gathers = []
    for gathered, heads in zip(all_gathered, group_heads, strict=True):
        # The message is packed where the gather would put it, which spares a copy of it.
        message = gathered[meta.cp_rank * meta.rows :][: meta.rows]
        pack_(message, inputs.k[:, heads], inputs.v[:, heads], meta.num_tokens)
        gathers.append(communicator.all_gather(gathered, message))
    # One group's keys in order at a time: its attention has read them before the next group's take their place.
    num_keys = meta.plan.num_tokens + meta.plan.num_prefix_tokens
    ordered = communicator.buffer("ordered", (num_keys, kv_heads, width), inputs.k.dtype, inputs.k.device)
    for group, (gathered, heads, gather) in enumerate(zip(all_gathered, group_heads, gathers, strict=True)):
        if prefix is not None:
            pack_(ordered, prefix.k[:, heads], prefix.v[:, heads], prefix.k.shape[0], meta.prefix_key_rows)
        gather.wait()
        # From rank-major order to each request's prefix and extend in one piece, K and V at once.
        gather_rows_(ordered, gathered, meta.restore_index, None if prefix is None else meta.extend_key_rows)
        query_heads = inputs.num_heads // groups
        step_heads = None if groups == 1 else slice(group * query_heads, (group + 1) * query_heads)
        yield Step(*unpack(ordered, head_dim), rows, step_heads)


def _rows(meta: CPMetadata) -> RaggedRows:
    chunks = meta.chunk_host
    # Causal over the whole context: the chunk's last query sees the range's last key.
    first_sees = chunks.k_len - chunks.q_len + 1
    return RaggedRows.build(chunks.q_len, meta.k_starts[chunks.request], chunks.k_len, first_sees, meta.device, chunks.request)


ALL_GATHER = Strategy(
    name="all_gather",
    steps=_steps,
    num_steps=lambda plan, window: 1,
    alignments=lambda plan, window: frozenset({"bottom_right"}),
)
