"""Strategy ``ring``: K and V travel from rank to rank; each hop is computed while the next is in flight (pass-KV).

Liu et al., Ring Attention with Blockwise Transformers, arXiv:2310.01889. Memory for keys stays at two messages.
A rank's shard holds, for each request, its chunks in sequence order; so what a chunk of queries sees of a foreign
shard is a beginning of the request's rows there, one key range, whether it is none, one chunk or all. A sliding window
breaks this, since the shard's rows then have gaps in position: with a window, a hop is one launch for each chunk that
a rank owns of a request.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import numpy as np

from cpattn.attention.rows import Alignment, RaggedRows, RowTable, find_alignment
from cpattn.exchange.communicator import Communicator
from cpattn.exchange.message import message_buffer, pack_, unpack
from cpattn.exchange.strategy import ExchangeInputs, Step, Strategy
from cpattn.metadata.batch import IntArray
from cpattn.metadata.cp_metadata import CPMetadata
from cpattn.metadata.device_tables import exclusive_cumsum
from cpattn.metadata.plan import Plan

Columns: TypeAlias = tuple[IntArray, IntArray, IntArray, IntArray]


def _steps(inputs: ExchangeInputs, meta: CPMetadata, communicator: Communicator) -> Iterator[Step]:
    k, v, prefix = inputs.k, inputs.v, inputs.prefix
    prefix_rows, hop_rows = meta.derive(("ring rows", inputs.window), lambda: _rows(meta, inputs.window))
    cp_size = meta.plan.cp_size
    travelling_rows = meta.rows if cp_size > 1 else 0
    here = message_buffer(communicator, "ring 0", k, v, travelling_rows)
    there = message_buffer(communicator, "ring 1", k, v, travelling_rows)
    if cp_size > 1:
        pack_(here, k, v, meta.num_tokens)
    hop_k, hop_v = k[: meta.num_tokens], v[: meta.num_tokens]
    for hop in range(cp_size):
        shift = communicator.shift(there, here) if hop + 1 < cp_size else None
        if hop == 0 and prefix is not None:
            yield Step(prefix.k, prefix.v, prefix_rows)
        for rows in hop_rows[hop]:
            yield Step(hop_k, hop_v, rows)
        if shift is not None:
            shift.wait()
        here, there = there, here
        hop_k, hop_v = unpack(here, k.shape[2])


def _rows(meta: CPMetadata, window: int | None) -> tuple[RaggedRows, list[list[RaggedRows]]]:
    """The rows of the prefix step, and of each launch of each hop."""
    launches = [_hop_tables(meta, (meta.cp_rank - hop) % meta.plan.cp_size, window) for hop in range(meta.plan.cp_size)]
    request = meta.chunk_host.request
    all_columns = [_prefix_table(meta, window), *(columns for hop in launches for columns in hop)]
    tables = [RowTable(*columns, request, find_alignment(*columns)) for columns in all_columns]
    prefix, *rows = RaggedRows.build_all(tables, meta.device)
    taken = iter(rows)
    return prefix, [[next(taken) for _ in hop] for hop in launches]


def _prefix_table(meta: CPMetadata, window: int | None) -> Columns:
    chunks, prefix_lens = meta.chunk_host, meta.plan.prefix_lens
    k_start = exclusive_cumsum(prefix_lens)[chunks.request]
    k_len = prefix_lens[chunks.request]
    if window is None:
        return chunks.q_len, k_start, k_len, k_len
    return _within_window(chunks.q_len, k_start, k_len, k_len + chunks.start + 1, window)


def _hop_tables(meta: CPMetadata, owner: int, window: int | None) -> list[Columns]:
    """This rank's queries against the shard of ``owner``: one launch, or with a window one for each chunk."""
    chunks, plan = meta.chunk_host, meta.plan
    columns = plan.rank_columns[owner]
    lengths = plan.lengths[chunks.request[:, None], columns]
    # A request's chunks follow each other in the shard, in sequence order.
    begins = plan.local_starts[chunks.request[:, None], columns]
    if window is None:
        before = np.where(columns < chunks.column[:, None], lengths, 0).sum(axis=1)
        if owner == meta.cp_rank:
            return [(chunks.q_len, begins[:, 0], before + chunks.q_len, before + 1)]
        return [(chunks.q_len, begins[:, 0], before, before)]
    tables = []
    for nth, column in enumerate(columns):
        k_len = np.where(column <= chunks.column, lengths[:, nth], 0)
        diagonal = chunks.start - plan.starts[chunks.request, column] + 1
        tables.append(_within_window(chunks.q_len, begins[:, nth], k_len, diagonal, window))
    return tables


def _within_window(q_len: IntArray, k_start: IntArray, k_len: IntArray, diagonal: IntArray, window: int) -> Columns:
    """Empties the ranges that lie before the first query's window, and so before every query's."""
    return q_len, k_start, np.where(diagonal - window >= k_len, 0, k_len), diagonal


def _num_steps(plan: Plan, window: int | None) -> int:
    launches_a_hop = 1 if window is None else plan.rank_columns.shape[1]
    return plan.cp_size * launches_a_hop + bool(plan.prefix_lens.any())


def _alignments(plan: Plan, window: int | None) -> frozenset[Alignment]:
    if window is not None:
        return frozenset({"any"})
    return frozenset({"bottom_right"} if _num_steps(plan, window) == 1 else {"bottom_right", "full"})


RING = Strategy(name="ring", steps=_steps, num_steps=_num_steps, alignments=_alignments)
