"""What ranks need of each other, counted query by query and key by key."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from inputs.cases import AttentionCase

from cpattn.device_tables import IntArray
from cpattn.exchange.head_shares import head_shares
from cpattn.metadata.layout import Layout
from cpattn.problem import Problem


def seen_keys(plan: Layout, window: int | None) -> tuple[dict[tuple[int, int], int], set[tuple[int, int, int]]]:
    """Of each new token, as (request, number), its rank; and which ranks have a query that sees it, as (rank, request, number)."""
    owner = {(chunk.request, chunk.start + i): chunk.rank for chunk in plan.chunks for i in range(chunk.length)}
    return owner, {
        (rank, request, key)
        for (request, query), rank in owner.items()
        for key in range(0 if window is None else max(0, query - window + 1), query + 1)
    }


def received_by_hosts(plan: Layout, window: int | None, within: int) -> tuple[list[int], list[int]]:
    """Rows that each rank receives from other hosts, and from ranks of its own, where each crosses once to the owner's place."""
    owner, seen = seen_keys(plan, window)
    across, inside = [0] * plan.cp_size, [0] * plan.cp_size
    for host, *key in {(rank // within, *key) for rank, *key in seen}:
        of = owner[key[0], key[1]]
        across[host * within + of % within] += of // within != host
    for rank, *key in seen:
        inside[rank] += owner[key[0], key[1]] % within != rank % within
    return across, inside


def wanted_over_shards(plan: Layout, window: int | None) -> list[int]:
    """Rows of keys, new ones and cached ones, that each rank receives where the plan says which token lies where: those that its queries
    see, and new ones that it is to hold, but for what it has."""
    wanted: set[tuple[int, int, int]] = set()
    owner, _ = seen_keys(plan, None)
    has: dict[tuple[int, int], int] = {}
    for request, (prefix, extend) in enumerate(plan.batch):
        for position in range(prefix + extend):
            if plan.owner is not None:
                holder = position // plan.owner.interleave % plan.cp_size
            else:
                assert plan.prefix_ranks is not None
                holder = int(plan.prefix_ranks.ranks[request][position]) if position < prefix else owner[request, position - prefix]
            has[request, position] = holder if position < prefix else owner[request, position - prefix]
            if position >= prefix:
                wanted.add((holder, request, position))
                rank = owner[request, position - prefix]
                first = 0 if window is None else max(0, position - window + 1)
                wanted |= {(rank, request, key) for key in range(first, position + 1)}
    received = [0] * plan.cp_size
    for rank, *key in wanted:
        received[rank] += has[key[0], key[1]] != rank
    return received


class Needed(NamedTuple):
    """By brute force, int64 ``[cp_size, cp_size]``: rows of keys of one rank that another's queries see, ``[owner, viewer]``, and queries
    of one rank that see keys of another, ``[source, owner]``."""

    keys: IntArray
    queries: IntArray

    @classmethod
    def of(cls, plan: Layout, window: int | None) -> Needed:
        keys, queries = np.zeros((2, plan.cp_size, plan.cp_size), dtype=np.int64)
        held = plan.shard_lens if plan.sharded else np.zeros((len(plan.batch), plan.cp_size), dtype=np.int64)
        owner, seen = seen_keys(plan, window)
        for (request, query), rank in owner.items():
            new = [(request, key) for key in range(0 if window is None else max(0, query - window + 1), query + 1)]
            for other in {owner[key] for key in new} | set(held[request].nonzero()[0].tolist()):
                queries[rank, other] += other != rank
        for rank, request, key in seen:
            keys[owner[request, key], rank] += owner[request, key] != rank
        for rank, request in {(rank, request) for (request, _), rank in owner.items()}:
            for other in range(plan.cp_size):
                keys[other, rank] += held[request, other] * (other != rank)
        return cls(keys, queries)

    def received(self, strategy: str, problem: Problem) -> IntArray:
        """``[cp_size]`` bytes, if nothing but what is needed comes."""
        if strategy.startswith("pass_q"):
            sent = self.queries.sum(axis=1) * problem.result_bytes
            return self.queries.sum(axis=0) * problem.query_bytes + sent  # type: ignore[no-any-return]
        return self.keys.sum(axis=0) * problem.key_bytes  # type: ignore[no-any-return]

    def sent(self, strategy: str, problem: Problem) -> IntArray:
        """The same of what goes out."""
        if strategy.startswith("pass_q"):
            return self.queries.sum(axis=1) * problem.query_bytes + self.queries.sum(axis=0) * problem.result_bytes  # type: ignore[no-any-return]
        return self.keys.sum(axis=1) * problem.key_bytes  # type: ignore[no-any-return]

    def received_by_heads(self, case: AttentionCase, within: int) -> list[int]:
        """Of each rank, where those are groups' and each of a group's ranks has keys of its share of the heads."""
        row = case.k[:1, :1].nbytes + case.v[:1, :1].nbytes
        shares = head_shares(case.heads, case.kv_heads, within)
        return [rows * share.kv_heads * row for rows in self.keys.sum(axis=0).tolist() for share in shares]
