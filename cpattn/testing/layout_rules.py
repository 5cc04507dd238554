"""The rules of a layout, each by brute force over tokens: what a plan says, against what its words mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from cpattn.metadata.plan import Plan

Rule = Callable[[Plan], Iterator[str]]
# Partitions that promise ranks at most one token apart, where the remainder is balanced.
_EVEN = ("zigzag", "contiguous", "whole")


class _Token(NamedTuple):
    """A new token: of which request, and which one of its new tokens."""

    request: int
    number: int

    def __str__(self) -> str:
        return f"new token {self.number} of request {self.request}"


def broken_rules(plan: Plan) -> Iterator[str]:
    """In words, what is wrong with a plan; nothing where it is right. The first rule that is broken comes first."""
    for rule in RULES:
        yield from rule(plan)


def _tokens(plan: Plan) -> list[_Token]:
    return [_Token(request, number) for request, (_, extend_len) in enumerate(plan.batch) for number in range(extend_len)]


def _rows(plan: Plan) -> list[list[_Token]]:
    """Each rank's tokens in the order of its rows, by the chunks alone."""
    rows: list[list[_Token]] = [[] for _ in range(plan.cp_size)]
    for request, start, length, rank in plan.chunks:
        if plan.all_queries:
            break
        rows[rank] += [_Token(request, number) for number in range(start, start + length)]
    return [_tokens(plan)] * plan.cp_size if plan.all_queries else rows


def every_token_has_one_rank(plan: Plan) -> Iterator[str]:
    """Each new token is on one rank."""
    owners: dict[_Token, list[int]] = {token: [] for token in _tokens(plan)}
    for request, start, length, rank in plan.chunks:
        if not 0 <= rank < plan.cp_size:
            yield f"a chunk of request {request} is on rank {rank}; ranks are 0 to {plan.cp_size - 1}"
        for number in range(start, start + length):
            token = _Token(request, number)
            if token not in owners:
                yield f"a chunk has {token}, which does not exist"
            else:
                owners[token].append(rank)
    for token, ranks in owners.items():
        if len(ranks) != 1:
            where = "no rank" if not ranks else f"ranks {', '.join(map(str, ranks))}"
            yield f"{token} is on {where}; each is on one"


def chunks_are_in_order(plan: Plan) -> Iterator[str]:
    """Chunks stand by request and then by position, and none is empty."""
    before = (-1, -1)
    for request, start, length, _ in plan.chunks:
        if length < 1:
            yield f"a chunk of request {request} has {length} tokens; leave out chunks without any"
        if (request, start) <= before:
            yield f"the chunk of request {request} from token {start} on comes after that of request {before[0]} from token {before[1]} on"
        before = (request, start)


def ranks_are_even(plan: Plan) -> Iterator[str]:
    """Ranks are at most one token apart, where the partition promises it; all have as many rows, enough and no more than pad_to asks."""
    counts = [len(rows) for rows in _rows(plan)]
    if plan.partition in _EVEN and plan.remainder == "balanced" and not plan.all_queries and max(counts) - min(counts) > 1:
        yield f"ranks have {counts} new tokens; partition {plan.partition!r} keeps them at most one apart"
    if tuple(counts) != plan.rank_tokens:
        yield f"rank_tokens is {list(plan.rank_tokens)}, but the chunks give ranks {counts} tokens"
    expected = -(-max(counts) // plan.pad_to) * plan.pad_to
    if plan.rows != expected:
        yield f"rows is {plan.rows}; the fullest rank has {max(counts)} tokens, which are {expected} rows with pad_to={plan.pad_to}"


def rows_hold_their_tokens(plan: Plan) -> Iterator[str]:
    """A rank's token_index, position_ids and num_tokens say which tokens its rows hold, and where these stand in their requests."""
    index = {token: number for number, token in enumerate(_tokens(plan))}
    for rank, tokens in enumerate(_rows(plan)):
        meta = plan.metadata(rank)
        padding = plan.rows - len(tokens)
        if meta.num_tokens != len(tokens):
            yield f"num_tokens of rank {rank} is {meta.num_tokens}; it has {len(tokens)} tokens"
        given = zip(meta.token_index.tolist(), meta.position_ids.tolist(), strict=True)
        expected = [(index[token], plan.batch[token.request].prefix_len + token.number) for token in tokens] + [(-1, 0)] * padding
        for row, (found, meant) in enumerate(zip(given, expected, strict=True)):
            if found != meant:
                what = tokens[row] if row < len(tokens) else "padding"
                yield f"row {row} of rank {rank} is {what}: token {meant[0]} at position {meant[1]}, not token {found[0]} at {found[1]}"


def restoring_undoes_sharding(plan: Plan) -> Iterator[str]:
    """restore_index finds each token among the rows of all ranks, one rank after another."""
    places = {token: (rank, row) for rank, tokens in enumerate(_rows(plan)) for row, token in reversed(list(enumerate(tokens)))}
    for rank in range(plan.cp_size):
        restored = plan.metadata(rank).restore_index.tolist()
        for token, place in zip(_tokens(plan), restored, strict=True):
            # Where each rank has all rows, any rank's will do.
            found = divmod(place, plan.rows)
            if found != places[token] and not (plan.all_queries and found[1] == places[token][1]):
                yield (
                    f"restore_index of rank {rank} looks for {token} in row {found[1]} of rank {found[0]}; it is in row "
                    f"{places[token][1]} of rank {places[token][0]}"
                )


def spans_cover_the_causal_keys(plan: Plan) -> Iterator[str]:
    """Each query's span ends with its own key, and begins with its request's first: all that it sees, and nothing else.

    The last query of a chunk sees all keys of its span, and each one before it one key fewer: cu_seqlens_q, k_start and k_len.
    """
    key_begin = np.cumsum(plan.total_lens) - plan.total_lens
    for rank, tokens in enumerate(_rows(plan)):
        meta = plan.metadata(rank)
        bounds, begins, lengths = meta.cu_seqlens_q.tolist(), meta.k_start.tolist(), meta.k_len.tolist()
        requests = meta.chunk_request.tolist()
        if bounds[0] != 0 or bounds[-1] != len(tokens):
            yield f"the chunks of rank {rank} have rows {bounds[0]} to {bounds[-1] - 1}; it has tokens in rows 0 to {len(tokens) - 1}"
            continue
        for chunk, (first, end) in enumerate(pairwise(bounds)):
            for row in range(first, end):
                token = tokens[row]
                position = plan.batch[token.request].prefix_len + token.number
                sees = lengths[chunk] - (end - 1 - row)
                if requests[chunk] != token.request or begins[chunk] != key_begin[token.request] or sees != position + 1:
                    yield (
                        f"{token} is at position {position} and sees {position + 1} keys of its request, from key "
                        f"{key_begin[token.request]} on; its span on rank {rank} has {sees} keys of request {requests[chunk]}, from "
                        f"key {begins[chunk]} on"
                    )


def caches_hold_every_token(plan: Plan) -> Iterator[str]:
    """shard_lens and held_lens count what each rank's cache holds of a request, before the step and after it, by the owner rule."""
    computed = {
        token: rank for request, start, length, rank in plan.chunks for token in (_Token(request, n) for n in range(start, start + length))
    }

    def counts(ranks: Iterable[int]) -> list[int]:
        each = list(ranks)
        return [each.count(rank) for rank in range(plan.cp_size)]

    for request, (prefix_len, extend_len) in enumerate(plan.batch):
        total = prefix_len + extend_len
        if not plan.sharded:
            # shard_lens is about parts of a prefix; here each rank has all of it.
            before, after = [0] * plan.cp_size, [total] * plan.cp_size
        elif plan.owner is not None:
            holder = [position // plan.owner.interleave % plan.cp_size for position in range(total)]
            before, after = counts(holder[:prefix_len]), counts(holder)
        else:
            if plan.prefix_ranks is not None:
                before = counts(plan.prefix_ranks.ranks[request].tolist())
            else:
                assert plan.prefix_shards is not None
                before = list(plan.prefix_shards[request])
            new = counts(computed[_Token(request, number)] for number in range(extend_len))
            after = [held + added for held, added in zip(before, new, strict=True)]
        for name, lengths, expected, when in (
            ("shard_lens", plan.shard_lens, before, "prefix tokens of request {} before"),
            ("held_lens", plan.held_lens, after, "tokens of request {} after"),
        ):
            found = lengths[request].tolist()
            if found != expected:
                yield f"{name} says that ranks hold {found} {when.format(request)} the step; by its rule it is {expected}"


RULES: tuple[Rule, ...] = (
    every_token_has_one_rank,
    chunks_are_in_order,
    ranks_are_even,
    rows_hold_their_tokens,
    restoring_undoes_sharding,
    spans_cover_the_causal_keys,
    caches_hold_every_token,
)
