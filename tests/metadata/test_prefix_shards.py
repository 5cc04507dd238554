"""Plans of a sharded cache, the row count that an engine asks for without a plan, and whose turn it is for the next token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs.paged_caches import random_shards
from inputs.strategies import Batch, any_plan_options, batches, named_plan_options, plan_options

import cpattn
from cpattn import Plan, PlanError
from cpattn.metadata.chunks import steps_off


def sharded_plan(batch: Batch, options: dict[str, Any], seed: int) -> Plan:
    return cpattn.plan(batch, **options, prefix_shards=random_shards(batch, options["cp_size"], seed))


class TestRequiredRows:
    @given(batches(), named_plan_options())
    @settings(max_examples=300)
    def test_it_is_what_the_plan_has(self, batch: Batch, options: dict[str, Any]) -> None:
        assert cpattn.required_rows(batch, **options) == cpattn.plan(batch, **options).rows

    @given(batches(), named_plan_options(), st.integers(0, 1000))
    def test_shards_do_not_change_it(self, batch: Batch, options: dict[str, Any], seed: int) -> None:
        options["remainder"] = "balanced"
        assert sharded_plan(batch, options, seed).rows == cpattn.required_rows(batch, **options)

    @given(batches(), any_plan_options(), st.booleans())
    @settings(deadline=None)
    def test_queries_split_by_heads_are_all_rows(self, batch: Batch, options: dict[str, Any], striped: bool) -> None:
        shards = None if striped else random_shards(batch, options["cp_size"], 0)
        plan = cpattn.plan(batch, **options, queries="all", prefix_shards=shards, owner=cpattn.Striped(3) if striped else None)
        assert plan.rows == cpattn.required_rows(batch, **options, queries="all") == -(-plan.num_tokens // plan.pad_to) * plan.pad_to

    @pytest.mark.parametrize(
        ("batch", "options", "error"),
        [
            ([(0, -1)], {}, cpattn.BatchError),
            ([(0, 1.5)], {}, cpattn.BatchError),
            ([(0, 1)], {"cp_size": 0}, PlanError),
            ([(0, 1)], {"cp_size": "2"}, PlanError),
            ([(0, 1)], {"pad_to": 0}, PlanError),
            ([(0, 1)], {"partition": "spiral"}, PlanError),
            ([(0, 1)], {"partition": ["zigzag"]}, PlanError),
            ([(0, 1)], {"remainder": "last"}, PlanError),
            ([(0, 1)], {"partition": "whole", "remainder": "first"}, PlanError),
            ([(0, 0)], {"cp_size": 2**31}, PlanError),
            ([(0, 1)], {"pad_to": 2**30}, PlanError),
            ([(0, 1)], {"queries": "heads"}, PlanError),
            ([(0, 1)], {"queries": ["all"]}, PlanError),
        ],
    )
    def test_it_refuses_what_a_plan_refuses(self, batch: Batch, options: dict[str, Any], error: type[Exception]) -> None:
        for function in (cpattn.required_rows, cpattn.plan):
            with pytest.raises(error):
                function(batch, **{"cp_size": 2} | options)


class TestShards:
    @given(batches(max_requests=8), named_plan_options(), st.integers(0, 1000))
    @settings(max_examples=200)
    def test_what_each_rank_holds(self, batch: Batch, options: dict[str, Any], seed: int) -> None:
        shards = random_shards(batch, options["cp_size"], seed)
        plan = sharded_plan(batch, options, seed)
        held = [sum(shares[rank] for shares in shards) + plan.rank_tokens[rank] for rank in range(plan.cp_size)]
        assert plan.sharded
        assert plan.shard_totals.tolist() == held
        assert plan.largest_shard == max(held)
        for request, extends in enumerate(plan.rank_extends.tolist()):
            assert extends == [sum(c.length for c in plan.chunks if (c.request, c.rank) == (request, rank)) for rank in range(plan.cp_size)]
        assert plan.rank_chunks == tuple(sum(c.rank == rank for c in plan.chunks) for rank in range(plan.cp_size))

    @given(batches(), plan_options(), st.integers(0, 1000))
    def test_left_over_tokens_go_where_few_of_their_requests_are_held(self, batch: Batch, options: dict[str, Any], seed: int) -> None:
        options["remainder"] = "balanced"
        plan = sharded_plan(batch, options, seed)
        assert max(plan.rank_tokens) - min(plan.rank_tokens) <= 1
        # What the first left-over token of each request finds on its rank, for every rank that the deal could begin with.
        before = np.cumsum([0, *(extend for _, extend in plan.batch)])[:-1]
        costs = [
            sum(
                int(plan.shard_lens[i, (dealer + before[i]) % plan.cp_size])
                for i, (_, extend) in enumerate(plan.batch)
                if extend % plan.cp_size
            )
            for dealer in range(plan.cp_size)
        ]
        dealer = costs.index(min(costs))
        turns = [(dealer + turn) % plan.cp_size for turn in range(plan.num_tokens % plan.cp_size)]
        fewest = plan.num_tokens // plan.cp_size
        assert plan.rank_tokens == tuple(fewest + (rank in turns) for rank in range(plan.cp_size))

    @pytest.mark.parametrize("partition", ["zigzag", "whole"])
    @pytest.mark.parametrize("cp_size", [1, 2, 3, 5])
    def test_decoding_goes_round(self, cp_size: int, partition: str) -> None:
        held = np.zeros(cp_size, dtype=int)
        for token in range(3 * cp_size):
            plan = cpattn.plan([(token, 1)], cp_size, partition=partition, prefix_shards=[held.tolist()])
            held += plan.rank_tokens
            assert held.max() - held.min() <= 1

    @pytest.mark.parametrize(("num_requests", "cp_size", "slack"), [(4, 4, 0), (3, 8, 0), (13, 8, 8), (64, 8, 4)])
    def test_whole_decodes_each_request_where_little_of_it_is_held(self, num_requests: int, cp_size: int, slack: int) -> None:
        """Ragged prompts, and then 40 steps: the fullest rank of a request has hardly more than a rank must have."""
        lengths = np.random.default_rng(0).integers(300, 1500, num_requests)
        held = np.zeros((num_requests, cp_size), dtype=np.int64)
        held += cpattn.plan([(0, n) for n in lengths.tolist()], cp_size, partition="whole", prefix_shards=held).rank_extends
        first, steps = held.copy(), 40
        for _ in range(steps):
            batch = [(n, 1) for n in held.sum(axis=1).tolist()]
            plan, free = (cpattn.plan(batch, cp_size, partition="whole", prefix_shards=shards) for shards in (held, None))
            assert sorted(plan.rank_chunks) == sorted(free.rank_chunks)
            assert steps_off(plan.rank_pairs) <= steps_off(free.rank_pairs)
            held += plan.rank_extends
        # What a rank must have: the level to which 40 more tokens fill up the ranks that have the least.
        for before, after in zip(first.tolist(), held.tolist(), strict=True):
            filled = list(before)
            for _ in range(steps):
                filled[filled.index(min(filled))] += 1
            assert max(after) <= max(filled) + slack

    @given(batches(), st.integers(2, 8), st.integers(0, 1000))
    def test_whole_stays_as_even_over_sharded_caches(self, batch: Batch, cp_size: int, seed: int) -> None:
        plan, free = sharded_plan(batch, {"cp_size": cp_size, "partition": "whole"}, seed), cpattn.plan(batch, cp_size, partition="whole")
        assert sorted(plan.rank_tokens) == sorted(free.rank_tokens)
        assert steps_off(plan.rank_pairs) <= steps_off(free.rank_pairs)

    @given(batches(), named_plan_options())
    def test_they_are_a_part_of_what_a_plan_is(self, batch: Batch, options: dict[str, Any]) -> None:
        plain, one, other = cpattn.plan(batch, **options), sharded_plan(batch, options, 1), sharded_plan(batch, options, 2)
        assert plain != one
        assert plain.fingerprint != one.fingerprint
        assert (one == other) == (one.fingerprint == other.fingerprint) == (one.prefix_shards == other.prefix_shards)
        again = cpattn.plan(batch, **options, prefix_shards=np.array(one.prefix_shards).reshape(-1, plain.cp_size))
        assert again == one
        assert hash(again) == hash(one)
        assert "sharded prefixes" in repr(one)

    def test_shares_may_be_in_any_form(self) -> None:
        shares = [[3, 4], [0, 0]]
        forms: list[Any] = [
            tuple(map(tuple, shares)),
            *(np.array(shares, dtype=dtype) for dtype in (np.int64, np.uint8)),
            torch.tensor(shares),
        ]
        forms += [[[np.int32(3), np.uint8(4)], [0, 0]], [np.array([3, 4]), (0, 0)]]
        plan = cpattn.plan([(7, 2), (0, 5)], 2, prefix_shards=shares)
        assert plan.prefix_shards == ((3, 4), (0, 0))
        for form in forms:
            assert cpattn.plan([(7, 2), (0, 5)], 2, prefix_shards=form) == plan
        given = np.array(shares)
        kept = cpattn.plan([(7, 2), (0, 5)], 2, prefix_shards=given)
        given += 1
        assert kept.shard_lens.tolist() == shares

    @pytest.mark.parametrize(
        ("shards", "message"),
        [
            (3, "prefix_shards is 3; pass 2 integers >= 0 for each request"),
            ([3, 4], r"prefix_shards is \[3, 4\]; pass 2 integers"),
            ([[3, 4]], "prefix_shards has 1 entries, the batch has 2 requests"),
            ([[3, 4], [0, 0], [0, 0]], "prefix_shards has 3 entries, the batch has 2 requests"),
            ([[3, 3], [0, 0]], r"prefix_shards of request 0 is \[3, 3\], its prefix_len is 7; pass 2 integers"),
            ([[3, 4], [1, -1]], r"prefix_shards of request 1 is \[1, -1\], its prefix_len is 0"),
            ([[7], [0]], r"prefix_shards of request 0 is \[7\], its prefix_len is 7"),
            ([[3, 4, 0], [0, 0, 0]], r"prefix_shards of request 0 is \[3, 4, 0\]"),
            ([[3.5, 3.5], [0, 0]], r"prefix_shards of request 0 is \[3.5, 3.5\]"),
            ([[True, 6], [0, 0]], r"prefix_shards of request 0 is \[True, 6\]"),
            (np.array([[3, 3], [0, 0]]), r"prefix_shards of request 0 is \[3, 3\], its prefix_len is 7"),
            (np.array([[8, -1], [0, 0]]), r"prefix_shards of request 0 is \[8, -1\], its prefix_len is 7"),
            (np.array([[3, 4]]), "prefix_shards has 1 entries, the batch has 2 requests"),
            (np.array([[[3], [4]], [[0], [0]]]), r"prefix_shards of request 0 is \[\[3\], \[4\]\]"),
            (np.ma.array([[3, 4], [0, 0]], mask=[[True, False], [False, False]]), r"prefix_shards of request 0 is \[None, 4\]"),
            (np.array([[True, False], [False, False]]), r"prefix_shards of request 0 is \[True, False\]"),
            (np.array([[3.0, 4.0], [0.0, 0.0]]), r"prefix_shards of request 0 is \[3.0, 4.0\]"),
            ([[2**63, 7 - 2**63], [0, 0]], "prefix_shards of request 0 is"),
            (np.array([[2**63 - 1, 2**63 + 8], [0, 0]], dtype=np.uint64), "prefix_shards of request 0 is"),  # 2**64 more than 7
        ],
    )
    def test_what_is_refused(self, shards: Any, message: str) -> None:
        with pytest.raises(PlanError, match=message):
            cpattn.plan([(7, 2), (0, 5)], 2, prefix_shards=shards)
