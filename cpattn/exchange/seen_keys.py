"""Which rows of new keys a rank's queries see, and where it finds them: the tables for that, on the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from torch import Tensor

from cpattn.device_tables import IntArray, Unsent, exclusive_cumsum, expand_runs_on_host, unsent_runs
from cpattn.metadata.cp_metadata import CPMetadata
from cpattn.metadata.draft import Draft
from cpattn.metadata.layout import Layout
from cpattn.metadata.needed_keys import Pieces, SeenKeys
from cpattn.metadata.own_keys import own_begins, tokens_before


def seen_keys(meta: CPMetadata, window: int | None) -> SeenKeys:
    """Of queries that see ``window`` keys, or all; worked out once for a batch."""
    found: SeenKeys | None = meta.memo.get(("seen keys", window))
    return found or meta.memo.keep(("seen keys", window), SeenKeys.of(meta.plan, meta.cp_rank, window))


def gathered_rows_seen(meta: CPMetadata, window: int | None, leaves_own: bool) -> Tensor:
    """Of each new token that has a place in this rank's order, its row among all ranks' rows, rank after rank: int32 ``[n]`` on the
    device. A negative entry stands for zeros, where queries that see ``window`` keys see none. In a bucket all new tokens have a place.

    Args:
        leaves_own: whether some are read in own rows (:mod:`cpattn.metadata.own_keys`), and have none.
    """
    return meta.derive_sent(gathered_rows_draft(meta, window, leaves_own))


def gathered_rows_draft(meta: CPMetadata, window: int | None, leaves_own: bool) -> Draft[Tensor]:
    """The same, to be sent with other tables."""
    return Draft(("gathered rows seen", window, leaves_own), lambda: _gathered_rows_seen(meta, window, leaves_own))


def _gathered_rows_seen(meta: CPMetadata, window: int | None, leaves_own: bool) -> Unsent[Tensor]:
    plan: Layout = meta.plan
    seen = seen_keys(meta, window)
    first = plan.chunk_table.rank[seen.pieces.entry] * meta.rows + seen.pieces.rows(plan)
    if meta.bucket is None:
        runs = unsent_runs({"rows": with_holes(seen, first, tokens_put(meta, seen.pieces, leaves_own))}, meta.device)
        return Unsent(runs.tables, lambda sent: runs.finish(sent)["rows"])
    total = int(seen.pieces.length.sum())
    rows = np.full(meta.whole_rows, -1, dtype=np.int32)
    rows[expand_runs_on_host(seen.pieces.token, seen.pieces.length, total)] = expand_runs_on_host(first, seen.pieces.length, total)
    return Unsent({"rows": rows}, lambda sent: sent["rows"])


class ExchangedRows(NamedTuple):
    """What one rank sends to each other one, and where it finds what it sees among its own rows and those that it receives.

    Its own rows are numbered from 0 on without those that it reads where they lie.

    Attributes:
        sent, received: rows to and from each rank, ``[cp_size]``.
        own: how many of its own rows have a number.
        numbers: int32 ``[meta.num_tokens]``: of each of its tokens that number, negative for none; None where all have one, in turn.
        outgoing: int32 ``[sum(sent)]``, its own rows, those for rank 0 first.
        source: like :func:`gathered_rows_seen`, among its own rows and then the rows received, those of rank 0 first.
    """

    sent: tuple[int, ...]
    received: tuple[int, ...]
    own: int
    numbers: Tensor | None
    outgoing: Tensor
    source: Tensor


def exchanged_rows(meta: CPMetadata, window: int | None, leaves_own: bool = False) -> ExchangedRows:
    """For queries that see ``window`` keys, or all; ``leaves_own`` as of :func:`gathered_rows_seen`."""
    return meta.derive_sent(exchanged_rows_draft(meta, window, leaves_own))


def exchanged_rows_draft(meta: CPMetadata, window: int | None, leaves_own: bool) -> Draft[ExchangedRows]:
    """The same, to be sent with other tables."""
    return Draft(("exchanged rows", window, leaves_own), lambda: _exchanged_rows(meta, window, leaves_own))


def _exchanged_rows(meta: CPMetadata, window: int | None, leaves_own: bool) -> Unsent[ExchangedRows]:
    plan: Layout = meta.plan
    seen = seen_keys(meta, window)
    own = Pieces.whole(plan).take(plan.by_rank.entries(meta.cp_rank))
    put = tokens_put(meta, own, leaves_own)
    # Of each entry of the chunk table by how much less its rows are numbered.
    less = np.zeros(len(plan.chunk_table.length), dtype=np.int64)
    less[own.entry] = own.rows(plan) - exclusive_cumsum(put)
    first, owner = seen.pieces.rows(plan) - less[seen.pieces.entry], plan.chunk_table.rank[seen.pieces.entry]
    arrives = arrivals(plan, seen, meta.cp_rank)
    num_own = int(put.sum())
    first[arrives] = num_own + exclusive_cumsum(seen.pieces.length[arrives])
    # What others see of this rank's chunks, theirs in the order in which they take them.
    seen_by_others = Pieces.of(plan, window)
    viewer = plan.chunk_table.rank[seen_by_others.seen_by]
    leaves = ((plan.chunk_table.rank[seen_by_others.entry] == meta.cp_rank) & (viewer != meta.cp_rank)).nonzero()[0]
    leaves = leaves[viewer[leaves].argsort(kind="stable")]
    leaving = seen_by_others.take(leaves)
    tables = {
        "outgoing": (leaving.rows(plan) - less[leaving.entry], leaving.length),
        "source": with_holes(seen, first, tokens_put(meta, seen.pieces, leaves_own)),
    }
    if num_own < meta.num_tokens:
        rest = own.length - put
        tables["numbers"] = np.stack([exclusive_cumsum(put), -rest], axis=1).ravel(), np.stack([put, rest], axis=1).ravel()
    runs = unsent_runs(tables, meta.device)
    sent_rows = _rows_of_ranks(viewer[leaves], leaving.length, plan.cp_size)
    received = _rows_of_ranks(owner[arrives], seen.pieces.length[arrives], plan.cp_size)

    def finish(sent: Mapping[str, Tensor]) -> ExchangedRows:
        found = runs.finish(sent)
        return ExchangedRows(sent_rows, received, num_own, found.get("numbers"), found["outgoing"], found["source"])

    return Unsent(runs.tables, finish)


def arrivals(plan: Layout, seen: SeenKeys, cp_rank: int) -> IntArray:
    """Which of the pieces that a rank sees are others', in the order in which it receives them: those of rank 0 first."""
    owner = plan.chunk_table.rank[seen.pieces.entry]
    arrives = (owner != cp_rank).nonzero()[0]
    ordered: IntArray = arrives[owner[arrives].argsort(kind="stable")]
    return ordered


def tokens_put(meta: CPMetadata, pieces: Pieces, leaves_own: bool) -> IntArray:
    """``[p]`` how many tokens of each piece are put in order, its first ones: all of those that are not read in own rows."""
    return tokens_before(meta.plan, pieces, own_begins(meta.plan, meta.cp_rank)) if leaves_own else pieces.length


def with_holes(seen: SeenKeys, first: IntArray, lengths: IntArray) -> tuple[IntArray, IntArray]:
    """The runs of rows that begin at ``first``, and in the places of those that nobody sees runs of negative numbers."""
    holes = seen.holes
    if not holes.any():
        return first, lengths
    return np.stack([-holes, first], axis=1).ravel(), np.stack([holes, lengths], axis=1).ravel()


def _rows_of_ranks(rank: IntArray, length: IntArray, cp_size: int) -> tuple[int, ...]:
    # Sums in float64 are exact: they are at most 2**31.
    return tuple(np.bincount(rank, length, minlength=cp_size).astype(np.int64).tolist())
