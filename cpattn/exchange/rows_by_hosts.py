"""One rank's part in what crosses hosts once: what it sends to others, what it passes on, and where it finds what its queries see."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor

from cpattn.device_tables import IntArray, exclusive_cumsum, expand_all
from cpattn.exchange.seen_keys import seen_keys, tokens_put, with_holes
from cpattn.metadata.cp_metadata import CPMetadata
from cpattn.metadata.layout import Layout
from cpattn.metadata.needed_by_hosts import providers, seen_by_hosts
from cpattn.metadata.needed_keys import Pieces


class RowsByHosts(NamedTuple):
    """Rows are numbered: this rank's tokens, then what comes from other hosts, then what comes from ranks of its own.

    Attributes:
        sent_across, received_across: rows to and from the ranks of its place, by host.
        sent_within, received_within: to and from those of its host, by place.
        outgoing: int32, which of its tokens it sends across, those for host 0 first.
        passed: int32, which of its tokens and of what came across go to the ranks of its host, those for place 0 first.
        source: like :func:`cpattn.exchange.seen_keys.gathered_rows_seen`, among all of them.
    """

    sent_across: tuple[int, ...]
    received_across: tuple[int, ...]
    sent_within: tuple[int, ...]
    received_within: tuple[int, ...]
    outgoing: Tensor
    passed: Tensor
    source: Tensor


def rows_by_hosts(meta: CPMetadata, window: int | None, within: int, leaves_own: bool) -> RowsByHosts:
    """For queries that see ``window`` keys, or all, and hosts of so many ranks; ``leaves_own`` as of
    :func:`cpattn.exchange.seen_keys.gathered_rows_seen`."""
    key = "rows by hosts", window, within, leaves_own
    made: RowsByHosts = meta.derive(key, lambda: _rows_by_hosts(meta, window, within, leaves_own))
    return made


def _rows_by_hosts(meta: CPMetadata, window: int | None, within: int, leaves_own: bool) -> RowsByHosts:
    plan: Layout = meta.plan
    rank, me = plan.chunk_table.rank, meta.cp_rank
    my_host, my_place = divmod(me, within)
    hosts = plan.cp_size // within
    by_hosts = seen_by_hosts(plan, window, within)
    owner, viewer = rank[by_hosts.entry], rank[by_hosts.seen_by] // within
    leaves = _sorted(((owner == me) & (viewer != my_host)).nonzero()[0], viewer)
    comes = _sorted(((viewer == my_host) & (owner % within == my_place) & (owner != me)).nonzero()[0], owner // within)
    comes = comes[owner[comes] // within != my_host]
    # Of each chunk that comes across, where its first token would lie: what comes of a chunk is its end.
    length = by_hosts.length[comes]
    first_across = np.zeros(len(rank), dtype=np.int64)
    first_across[by_hosts.entry[comes]] = meta.num_tokens + exclusive_cumsum(length) - by_hosts.token[comes]

    def at_hand(pieces: Pieces) -> IntArray:
        """Where pieces begin that are this rank's own, or came across to it."""
        return np.where(rank[pieces.entry] == me, pieces.rows(plan), first_across[pieces.entry] + pieces.token)

    all_seen = Pieces.of(plan, window)
    to, provider = rank[all_seen.seen_by], providers(plan, all_seen, within)
    passes = _sorted(((provider == me) & (to != me)).nonzero()[0], to)
    passed = all_seen.take(passes)
    seen = seen_keys(meta, window)
    provider_of = providers(plan, seen.pieces, within)
    arrives = _sorted((provider_of != me).nonzero()[0], provider_of)
    first = at_hand(seen.pieces)
    arriving = seen.pieces.length[arrives]
    first[arrives] = meta.num_tokens + int(length.sum()) + exclusive_cumsum(arriving)
    leaving = by_hosts.take(leaves)
    tables = expand_all(
        {
            "outgoing": (leaving.rows(plan), leaving.length),
            "passed": (at_hand(passed), passed.length),
            "source": with_holes(seen, first, tokens_put(meta, seen.pieces, leaves_own)),
        },
        meta.device,
    )
    return RowsByHosts(
        _rows_of(viewer[leaves], leaving.length, hosts),
        _rows_of(owner[comes] // within, length, hosts),
        _rows_of(to[passes] % within, passed.length, within),
        _rows_of(provider_of[arrives] % within, arriving, within),
        tables["outgoing"],
        tables["passed"],
        tables["source"],
    )


def _sorted(which: IntArray, by: IntArray) -> IntArray:
    """In the order in which both ends take them: by rank or host, and as they stand for each."""
    found: IntArray = which[by[which].argsort(kind="stable")]
    return found


def _rows_of(index: IntArray, length: IntArray, many: int) -> tuple[int, ...]:
    # Sums in float64 are exact: they are at most 2**31.
    return tuple(np.bincount(index, length, minlength=many).astype(np.int64).tolist())
