"""The plan: what is cut where, who owns it, how even that is, when two plans are the same, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import pickle
import subprocess
import sys
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs.strategies import (
    NAMED_BATCHES,
    Batch,
    any_plan_options,
    batches,
    cp_sizes,
    named_batches,
    pad_tos,
    partitions,
    plan_options,
    remainders,
)

import cpattn
from cpattn import BatchError, Chunk, CPError, Plan, PlanError, RankError, Request


def chunk_owner(partition: str, cp_size: int) -> list[int]:
    """The definition: the rank of each chunk of a request."""
    if partition == "contiguous":
        return list(range(cp_size))
    return [min(j, 2 * cp_size - 1 - j) for j in range(2 * cp_size)]


def chunk_lengths(batch: Batch, partition: str, cp_size: int, remainder: str) -> list[list[int]]:
    """The definition: one token after another is dealt, until no request has any left.

    "first" deals each request's to its chunks in turn, from the first chunk on. "balanced" deals to the ranks in turn,
    from the rank on at which the request before stopped, and each rank puts it in the earliest of its shortest chunks.
    """
    owner = chunk_owner(partition, cp_size)
    turn = 0
    lengths = []
    for _, extend_len in batch:
        chunks = [0] * len(owner)
        for token in range(extend_len):
            if remainder == "first":
                chunks[token % len(chunks)] += 1
            else:
                chunks[min((j for j in range(len(chunks)) if owner[j] == turn % cp_size), key=chunks.__getitem__)] += 1
                turn += 1
        lengths.append(chunks)
    return lengths


class TestLayout:
    @given(batches(), any_plan_options())
    @settings(max_examples=300)
    def test_chunks_cover_each_request_in_order(self, batch: Batch, options: dict[str, Any]) -> None:
        plan = cpattn.plan(batch, **options)
        assert all(type(chunk) is Chunk and chunk.length > 0 for chunk in plan.chunks)
        assert [chunk.request for chunk in plan.chunks] == sorted(chunk.request for chunk in plan.chunks)
        for i, (_, extend_len) in enumerate(batch):
            end = 0
            for chunk in plan.chunks:
                if chunk.request == i:
                    assert chunk.start == end
                    end += chunk.length
            assert end == extend_len

    @given(batches(), plan_options())
    @settings(max_examples=300)
    def test_each_token_belongs_to_exactly_one_rank(self, batch: Batch, options: dict[str, Any]) -> None:
        plan = cpattn.plan(batch, **options)
        owned = [(c.request, c.start + i) for rank in range(plan.cp_size) for c in plan.chunks if c.rank == rank for i in range(c.length)]
        assert sorted(owned) == [(i, token) for i, (_, extend_len) in enumerate(batch) for token in range(extend_len)]

    @given(batches(), plan_options())
    @settings(max_examples=300)
    def test_chunk_owners_are_those_of_the_partition(self, batch: Batch, options: dict[str, Any]) -> None:
        plan = cpattn.plan(batch, **options)
        owner = chunk_owner(str(plan.partition), plan.cp_size)
        for i, (_, extend_len) in enumerate(batch):
            ranks = [chunk.rank for chunk in plan.chunks if chunk.request == i]
            if extend_len >= len(owner):
                assert ranks == owner
            else:  # Some chunks are empty; the others keep their order.
                remaining = iter(owner)
                assert all(rank in remaining for rank in ranks)
                assert len(ranks) == extend_len

    @given(batches(), plan_options())
    @settings(max_examples=300)
    def test_chunk_lengths_of_a_request_differ_by_at_most_one(self, batch: Batch, options: dict[str, Any]) -> None:
        plan = cpattn.plan(batch, **options)
        num_chunks = len(chunk_owner(str(plan.partition), plan.cp_size))
        for i, (_, extend_len) in enumerate(batch):
            lengths = [chunk.length for chunk in plan.chunks if chunk.request == i]
            assert set(lengths) <= {extend_len // num_chunks, -(-extend_len // num_chunks)}

    @given(batches(max_extend=40), plan_options())
    @settings(max_examples=300)
    def test_lengths_equal_their_definition(self, batch: Batch, options: dict[str, Any]) -> None:
        plan = cpattn.plan(batch, **options)
        expected = []
        for i, lengths in enumerate(chunk_lengths(batch, str(plan.partition), plan.cp_size, plan.remainder)):
            start = 0
            for length, rank in zip(lengths, chunk_owner(str(plan.partition), plan.cp_size), strict=True):
                if length:
                    expected.append(Chunk(i, start, length, rank))
                start += length
        assert plan.chunks == tuple(expected)

    @pytest.mark.parametrize("batch", named_batches())
    @pytest.mark.parametrize("cp_size", range(1, 9))
    def test_rank_tokens_and_num_tokens(self, batch: Batch, cp_size: int) -> None:
        plan = cpattn.plan(batch, cp_size)
        assert plan.num_tokens == sum(extend_len for _, extend_len in batch)
        assert plan.rank_tokens == tuple(sum(c.length for c in plan.chunks if c.rank == rank) for rank in range(cp_size))

    @given(batches(), any_plan_options())
    @settings(max_examples=300)
    def test_rows_hold_the_fullest_rank_and_no_more(self, batch: Batch, options: dict[str, Any]) -> None:
        plan = cpattn.plan(batch, **options)
        assert plan.rows % plan.pad_to == 0
        assert max(plan.rank_tokens) <= plan.rows < max(plan.rank_tokens) + plan.pad_to

    @given(batches(), any_plan_options())
    def test_padding_moves_no_token(self, batch: Batch, options: dict[str, Any]) -> None:
        plans = [cpattn.plan(batch, **options | {"pad_to": pad_to}) for pad_to in (1, 8, 64)]
        for attribute in ("batch", "num_tokens", "chunks", "rank_tokens", "rank_pairs", "token_imbalance", "pair_imbalance"):
            assert len({getattr(plan, attribute) for plan in plans}) == 1, attribute


class TestBalance:
    @given(batches(max_requests=24), cp_sizes, partitions)
    @settings(max_examples=300)
    def test_balanced_ranks_differ_by_at_most_one_token(self, batch: Batch, cp_size: int, partition: str) -> None:
        tokens = cpattn.plan(batch, cp_size, partition=partition).rank_tokens
        assert max(tokens) - min(tokens) <= 1

    @pytest.mark.parametrize("batch", named_batches())
    @pytest.mark.parametrize("partition", ["zigzag", "contiguous", "whole"])
    @pytest.mark.parametrize("cp_size", [2, 3, 4, 5, 7, 8, 64])
    def test_balanced_on_named_batches(self, batch: Batch, partition: str, cp_size: int) -> None:
        tokens = cpattn.plan(batch, cp_size, partition=partition).rank_tokens
        assert max(tokens) - min(tokens) <= 1

    @pytest.mark.parametrize("cp_size", [2, 4, 5, 7, 8])
    def test_first_drifts_apart_where_balanced_does_not(self, cp_size: int) -> None:
        """64 requests of 9 leave something over each time; so the bound above is one that a rule can break."""
        batch = NAMED_BATCHES["64 requests of 9"]
        drift = {r: np.ptp(cpattn.plan(batch, cp_size, remainder=r).rank_tokens) for r in ("first", "balanced")}
        assert drift["first"] >= 64
        assert drift["balanced"] <= 1

    @given(batches(max_extend=24), any_plan_options())
    @settings(max_examples=300)
    def test_rank_pairs_count_what_each_query_sees(self, batch: Batch, options: dict[str, Any]) -> None:
        plan = cpattn.plan(batch, **options)
        pairs = [0] * plan.cp_size
        for request, start, length, rank in plan.chunks:
            for token in range(start, start + length):
                pairs[rank] += sum(1 for _ in range(batch[request][0] + token + 1))
        assert plan.rank_pairs == tuple(pairs)

    @given(batches(), any_plan_options())
    def test_imbalance_is_max_over_mean(self, batch: Batch, options: dict[str, Any]) -> None:
        plan = cpattn.plan(batch, **options)
        for figure, values in ((plan.token_imbalance, plan.rank_tokens), (plan.pair_imbalance, plan.rank_pairs)):
            assert figure == pytest.approx(max(values) / (sum(values) / len(values)) if any(values) else 1.0)
            assert 1.0 <= figure <= plan.cp_size

    def test_imbalance_figures(self) -> None:
        # Rank 0 has positions 0 1 4 of request 0 and 10 of request 1; rank 1 has 2 3, and 11 12. Each sees one key more.
        plan = cpattn.plan([(0, 5), (10, 3)], 2, remainder="first")
        assert plan.rank_tokens == (4, 4)
        assert plan.rank_pairs == (1 + 2 + 5 + 11, 3 + 4 + 12 + 13)
        assert plan.token_imbalance == 1.0
        assert plan.pair_imbalance == pytest.approx(32 / 25.5)

    def test_zigzag_evens_out_what_contiguous_does_not(self) -> None:
        assert cpattn.plan([(0, 4096)], 8).pair_imbalance == 1.0
        assert cpattn.plan([(0, 4096)], 8, partition="contiguous").pair_imbalance > 1.8

    def test_pairs_of_the_longest_batch_do_not_overflow(self) -> None:
        length = 2**31 - 2
        assert sum(cpattn.plan([(0, length)], 2).rank_pairs) == length * (length + 1) // 2


OTHER_TYPES = {
    "tuple of tuples": lambda batch: tuple(map(tuple, batch)),
    "list of lists": lambda batch: list(map(list, batch)),
    "Requests": lambda batch: [Request(*request) for request in batch],
    "int32 array": lambda batch: np.array(batch, dtype=np.int32).reshape(-1, 2),
    "int64 array": lambda batch: np.array(batch, dtype=np.int64).reshape(-1, 2),
    "uint64 array": lambda batch: np.array(batch, dtype=np.uint64).reshape(-1, 2),
    "big-endian array": lambda batch: np.array(batch, dtype=">i8").reshape(-1, 2),
    "column-major array": lambda batch: np.asfortranarray(np.array(batch, dtype=np.int64).reshape(-1, 2)),
    "every second row of an array": lambda batch: np.repeat(np.array(batch, dtype=np.int64).reshape(-1, 2), 2, axis=0)[::2],
    "numpy scalars": lambda batch: [(np.int32(prefix_len), np.int64(extend_len)) for prefix_len, extend_len in batch],
    "object array": lambda batch: np.array(batch, dtype=object).reshape(-1, 2),
    "CPU tensor": lambda batch: torch.tensor(batch, dtype=torch.int64).reshape(-1, 2),
}


class TestIdentity:
    @given(batches(), any_plan_options())
    @settings(deadline=None)
    def test_plans_of_every_rank_are_the_same(self, batch: Batch, options: dict[str, Any]) -> None:
        a, b = cpattn.plan(batch, **options), cpattn.plan(batch, **options)
        # What was worked out on the way does not count.
        a.summary()
        assert len(a.metadata(0).restore_index) == a.num_tokens
        assert a == b
        assert hash(a) == hash(b)
        assert a.fingerprint == b.fingerprint
        assert a.chunks == b.chunks

    @pytest.mark.parametrize("convert", [pytest.param(convert, id=name.replace(" ", "-")) for name, convert in OTHER_TYPES.items()])
    @pytest.mark.parametrize("batch", named_batches(["no requests", "nothing new", "one token", "prefill beside decode", "primes"]))
    def test_equal_batches_of_other_types(self, batch: Batch, convert: Any) -> None:
        a, b = cpattn.plan(batch, 4), cpattn.plan(convert(batch), 4)
        assert a == b
        assert hash(a) == hash(b)
        assert a.fingerprint == b.fingerprint
        assert a.batch == b.batch == tuple(batch)
        for request in b.batch:
            assert type(request) is Request
            assert [type(length) for length in request] == [int, int]

    def test_unsigned_numpy_scalars(self) -> None:
        """numpy makes floats of a uint64 beside a signed integer; the batch is one of integers all the same."""
        assert cpattn.plan([(np.uint64(3), 4), (5, np.uint64(6))], 2) == cpattn.plan([(3, 4), (5, 6)], 2)

    def test_equal_options_of_other_types(self) -> None:
        class Partition(str, Enum):
            ZIGZAG = "zigzag"

        a = cpattn.plan([(0, 9)], 4, pad_to=8)
        for b in (
            cpattn.plan([(0, 9)], np.int64(4), pad_to=np.int32(8)),
            cpattn.plan([(0, 9)], 4, pad_to=8, partition=Partition.ZIGZAG),
            cpattn.plan([(0, 9)], 4, pad_to=8, partition=np.str_("zigzag")),
            cpattn.plan([(0, 9)], 4, pad_to=8, remainder=np.str_("balanced")),
        ):
            assert a == b
            assert hash(a) == hash(b)
            assert a.fingerprint == b.fingerprint

    # A small domain, so that equal ones are drawn too.
    @given(*2 * [st.tuples(batches(2, 1, 2), st.integers(1, 2), partitions, remainders, st.sampled_from([1, 2]))])
    @settings(max_examples=200)
    def test_fingerprints_are_equal_exactly_when_plans_are(self, a: tuple[Any, ...], b: tuple[Any, ...]) -> None:
        plan_a, plan_b = (
            cpattn.plan(batch, cp_size, partition=partition, remainder=remainder, pad_to=pad_to)
            for batch, cp_size, partition, remainder, pad_to in (a, b)
        )
        assert (plan_a == plan_b) == (a == b)
        assert (plan_a.fingerprint == plan_b.fingerprint) == (a == b)

    def test_any_change_changes_the_fingerprint(self) -> None:
        batch = [(0, 5), (7, 9), (2, 1)]
        plans = [
            cpattn.plan(batch, 4),
            cpattn.plan(batch, 3),
            cpattn.plan(batch, 4, partition="contiguous"),
            cpattn.plan(batch, 4, partition="whole"),
            cpattn.plan(batch, 4, remainder="first"),
            cpattn.plan(batch, 4, pad_to=2),
            cpattn.plan([(7, 9), (0, 5), (2, 1)], 4),
            cpattn.plan([(5, 0), (7, 9), (2, 1)], 4),
            cpattn.plan([(0, 5), (7, 9)], 4),
            cpattn.plan([(0, 5), (7, 9), (2, 1), (0, 0)], 4),
            cpattn.plan([(0, 5), (7, 9), (2, 2)], 4),
            cpattn.plan([(0, 5), (7, 9), (3, 1)], 4),
            cpattn.plan([(0, 5), (7 + 2**30, 9), (2, 1)], 4),
            cpattn.plan([], 4),
            cpattn.plan([(0, 0)], 4),
        ]
        assert len({plan.fingerprint for plan in plans}) == len(plans)
        assert len(set(plans)) == len(plans)

    def test_fingerprint_is_the_same_in_another_process(self) -> None:
        cases: list[tuple[Batch, int, dict[str, Any]]] = [
            ([(0, 5), (7, 9)], 4, {"pad_to": 8}),
            ([], 1, {}),
            ([(3, 1)] * 9, 7, {"partition": "contiguous", "remainder": "first"}),
            ([(3, 90), (0, 61), (7, 1), (0, 8)], 3, {"partition": "whole"}),
        ]
        code = (
            "import json, sys, cpattn\n"
            "print(json.dumps([cpattn.plan(batch, cp_size, **options).fingerprint for batch, cp_size, options in json.loads(sys.argv[1])]))"
        )
        env = os.environ | {"PYTHONHASHSEED": "4242", "PYTHONPATH": str(Path(cpattn.__file__).parents[1])}
        child = subprocess.run([sys.executable, "-c", code, json.dumps(cases)], env=env, capture_output=True, text=True, check=False)
        assert child.returncode == 0, child.stderr
        here = [cpattn.plan(batch, cp_size, **options).fingerprint for batch, cp_size, options in cases]
        assert json.loads(child.stdout) == here
        assert all(len(fingerprint) == 32 and int(fingerprint, 16) >= 0 for fingerprint in here)

    def test_copies_are_equal(self) -> None:
        plan = cpattn.plan([(0, 5), (7, 9)], 4)
        assert plan.rank_pairs
        for other in (copy.copy(plan), copy.deepcopy(plan), pickle.loads(pickle.dumps(plan)), dataclasses.replace(plan)):
            assert other == plan
            assert other.fingerprint == plan.fingerprint
            assert other.rank_pairs == plan.rank_pairs
        wider = dataclasses.replace(plan, cp_size=2)
        assert wider == cpattn.plan([(0, 5), (7, 9)], 2)
        assert wider.rank_pairs == cpattn.plan([(0, 5), (7, 9)], 2).rank_pairs

    def test_a_plan_is_frozen_and_hashable(self) -> None:
        plan = cpattn.plan([(0, 5)], 4)
        for field in dataclasses.fields(Plan):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(plan, field.name, getattr(plan, field.name))
        assert {plan: "seen"}[cpattn.plan([(0, 5)], 4)] == "seen"

    def test_plan_equals_the_class(self) -> None:
        assert Plan([(0, 5)], 4) == cpattn.plan([(0, 5)], 4)  # type: ignore[arg-type]


class TestCallersInput:
    @given(batches(), any_plan_options())
    def test_a_list_is_not_changed(self, batch: Batch, options: dict[str, Any]) -> None:
        mine = list(map(list, batch))
        cpattn.plan(mine, **options).metadata(0)  # type: ignore[arg-type]
        assert mine == list(map(list, batch))

    @pytest.mark.parametrize("dtype", [np.int32, np.int64])
    def test_an_array_is_neither_changed_nor_kept(self, dtype: type) -> None:
        mine: np.ndarray = np.array([[0, 5], [7, 9]], dtype=dtype)
        plan = cpattn.plan(mine, 4)
        plan.metadata(0)
        assert mine.tolist() == [[0, 5], [7, 9]]
        mine[:] = 1
        assert plan == cpattn.plan([(0, 5), (7, 9)], 4)
        assert plan.num_tokens == 14
        assert plan.rank_tokens == cpattn.plan([(0, 5), (7, 9)], 4).rank_tokens
        assert plan.fingerprint == cpattn.plan([(0, 5), (7, 9)], 4).fingerprint

    def test_a_list_is_not_kept(self) -> None:
        mine = [[0, 5], [7, 9]]
        plan = cpattn.plan(mine, 4)  # type: ignore[arg-type]
        mine[0][1] = 100
        mine.append([1, 1])
        assert plan.batch == ((0, 5), (7, 9))
        assert plan.rank_tokens == cpattn.plan([(0, 5), (7, 9)], 4).rank_tokens

    def test_a_read_only_array_will_do(self) -> None:
        mine = np.array([[0, 5], [7, 9]])
        mine.setflags(write=False)
        assert cpattn.plan(mine, 4) == cpattn.plan([(0, 5), (7, 9)], 4)


PAIR_RULE = r"a batch is a sequence of \(prefix_len, extend_len\) pairs of integers >= 0"

# What is passed, and what the message must say about it.
BAD_BATCHES: dict[str, tuple[Any, str]] = {
    "negative prefix": ([(0, 4), (-3, 5)], r"request 1 has prefix_len=-3; a length cannot be negative"),
    "negative extend": ([(0, 4), (1, 5), (2, -1), (-1, -1)], r"request 2 has extend_len=-1; a length cannot be negative"),
    "negative in an array": (np.array([[0, 4], [2, -7]]), r"request 1 has extend_len=-7; a length cannot be negative"),
    "float": ([(0, 4), (1, 2.0)], r"request 1 has extend_len=2\.0 \(float\), which is not an integer"),
    "float array": (np.array([[1.0, 2.0]]), r"request 0 has prefix_len=1\.0 \(float\), which is not an integer"),
    "NaN": ([(0, float("nan"))], r"request 0 has extend_len=nan"),
    "string length": ([(0, "3")], r"request 0 has extend_len='3' \(str\), which is not an integer"),
    "None length": ([(0, 1), (None, 3)], r"request 1 has prefix_len=None \(NoneType\), which is not an integer"),
    "two bools": ([(True, True)], r"request 0 has prefix_len=True \(bool\), which is not an integer"),
    "a bool beside an integer": ([(0, 4), (3, True)], r"request 1 has extend_len=True \(bool\), which is not an integer"),
    "bool array": (np.array([[False, True]]), r"request 0 has prefix_len=.*False.*, which is not an integer"),
    "triple": ([(0, 4), (0, 4, 4)], r"request 1 is \(0, 4, 4\), which is not a pair"),
    "all triples": ([(0, 4, 4)], r"request 0 is \(0, 4, 4\), which is not a pair"),
    "as many triples as make pairs": ([(0, 4, 4), (1, 4, 4)], r"request 0 is \(0, 4, 4\), which is not a pair"),
    "single": ([(4,)], r"request 0 is \(4,\), which is not a pair"),
    "empty request": ([()], r"request 0 is \(\), which is not a pair"),
    "flat list": ([0, 4], r"request 0 is 0, which is not a pair"),
    "flat array": (np.array([0, 4]), r"request 0 is .*0.*, which is not a pair"),
    "request is None": ([(0, 4), None], r"request 1 is None, which is not a pair"),
    "request is a string": (["12"], r"request 0 is '12', which is not a pair"),
    "request is a 0-d array": ([np.array(5)], r"request 0 is array\(5\), which is not a pair"),
    "request is a scalar tensor": ([torch.tensor(5)], r"request 0 is tensor\(5\), which is not a pair"),
    "nested too deep": ([((0, 4), (1, 4))], r"request 0 has prefix_len=\(0, 4\) \(tuple\), which is not an integer"),
    "3-d array": (np.zeros((2, 2, 2), dtype=np.int64), r"request 0 has prefix_len=\[0, 0\] \(list\)"),
    "None": (None, r"batch is a NoneType"),
    "integer": (5, r"batch is a int"),
    "0-d array": (np.array(5), r"batch is a ndarray"),
    "scalar tensor": (torch.tensor(5), r"batch is a Tensor"),
    "string": ("ab", r"batch is a str"),
    "empty string": ("", r"batch is a str"),
    "bytes": (b"ab", r"batch is a bytes"),
    "set": ({(0, 4)}, r"batch is a set"),
    "empty dict": ({}, r"batch is a dict"),
    "2**31": ([(0, 4), (0, 2**31)], r"request 1 has extend_len=2147483648; the limit is 2147483647"),
    "2**31 in all": ([(2**30, 2**29), (2**29, 0)], r"2147483648 tokens.*limit is 2147483647"),
    "2**63": ([(0, 4), (0, 2**63)], r"request 1 has extend_len=9223372036854775808; the limit is 2147483647"),
    "2**100": ([(0, 4), (2**100, 0)], r"request 1 has prefix_len=1267650600228229401496703205376; the limit is 2147483647"),
    "sums beyond int64": (np.full((4, 2), 2**62), r"request 0 has prefix_len=4611686018427387904; the limit is 2147483647"),
    "the first fault is a negative one": ([(0, 4), (0, -3), (1,)], r"request 1 has extend_len=-3; a length cannot be negative"),
}


def junk_batches() -> st.SearchStrategy[Any]:
    """Batches in which now and then something is right."""
    anything = st.integers(0, 9) | st.integers() | st.none() | st.booleans() | st.floats() | st.text(max_size=2) | st.binary(max_size=2)
    request = st.tuples(anything, anything) | st.lists(anything, max_size=3) | anything
    return st.lists(request, max_size=3) | st.tuples(request, request) | request | st.dictionaries(st.integers(0, 3), request, max_size=2)


class TestRefusals:
    @pytest.mark.parametrize(("batch", "message"), [pytest.param(*case, id=name.replace(" ", "-")) for name, case in BAD_BATCHES.items()])
    def test_bad_batch(self, batch: Any, message: str) -> None:
        with pytest.raises(BatchError, match=message):
            cpattn.plan(batch, 2)

    def test_a_generator_is_no_batch(self) -> None:
        with pytest.raises(BatchError, match="batch is a generator.*" + PAIR_RULE):
            cpattn.plan((request for request in [(0, 4)]), 2)  # type: ignore[arg-type]

    @pytest.mark.parametrize("name", ["float", "triple", "None length", "negative prefix", "None", "string"])
    def test_every_message_says_the_rule(self, name: str) -> None:
        with pytest.raises(BatchError, match=PAIR_RULE):
            cpattn.plan(BAD_BATCHES[name][0], 2)

    @given(
        st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=4),
        st.sampled_from([(-1, 0), (0, -1), (1.0, 2), (1, 2.5), (None, 1), ("1", 2), (1,), (1, 2, 3), None, 7, "12", (0, 2**80), (True, 1)]),
        st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=4),
    )
    def test_the_offending_request_is_named(self, before: Batch, fault: Any, after: Batch) -> None:
        with pytest.raises(BatchError, match=rf"request {len(before)} (is|has) "):
            cpattn.plan([*before, fault, *after], 2)

    @given(junk_batches())
    @settings(max_examples=300, deadline=None)
    def test_anything_else_is_refused_with_a_batch_error(self, junk: Any) -> None:
        def is_length(value: Any) -> bool:
            return type(value) is int and value >= 0

        legal = isinstance(junk, (list, tuple)) and all(
            isinstance(pair, (list, tuple)) and len(pair) == 2 and all(map(is_length, pair)) for pair in junk
        )
        try:
            plan = cpattn.plan(junk, 1)
        except BatchError:
            # Lengths beyond int32 are the one thing that is well formed and still refused.
            assert not legal or sum(map(sum, junk)) > 2**31 - 1
        else:
            assert legal
            assert plan.batch == tuple(map(tuple, junk))

    @pytest.mark.parametrize("value", [0, -1, 2.0, True, None, "4", np.float64(2), [2]], ids=repr)
    @pytest.mark.parametrize("name", ["cp_size", "pad_to"])
    def test_bad_count(self, name: str, value: Any) -> None:
        with pytest.raises(PlanError, match=rf"^{name}=") as refusal:
            cpattn.plan([(0, 4)], **{"cp_size": 2} | {name: value})
        assert f"{name}={value!r}; it must be an integer" in str(refusal.value)

    @pytest.mark.parametrize("name", ["cp_size", "pad_to"])
    def test_a_count_that_is_too_large_is_told_so(self, name: str) -> None:
        options: dict[str, Any] = {"cp_size": 2, name: 2**40}
        limit = {"cp_size": 65536, "pad_to": 2147483647}[name]
        with pytest.raises(PlanError, match=f"{name}=1099511627776; the limit is {limit} "):
            cpattn.plan([(0, 4)], **options)

    @pytest.mark.parametrize("value", ["striped", "Zigzag", "", None, 3, ["zigzag"], ("zigzag", "contiguous")], ids=repr)
    def test_unknown_partition(self, value: Any) -> None:
        with pytest.raises(PlanError, match=r"^partition=.* is unknown; choose one of 'zigzag', 'contiguous', 'whole'") as refusal:
            cpattn.plan([(0, 4)], 2, partition=value)
        assert repr(value) in str(refusal.value)

    @pytest.mark.parametrize("value", ["last", "Balanced", "", None, 1, ["first"]], ids=repr)
    def test_unknown_remainder(self, value: Any) -> None:
        with pytest.raises(PlanError, match=r"^remainder=.* is unknown; choose one of 'balanced', 'first'") as refusal:
            cpattn.plan([(0, 4)], 2, remainder=value)
        assert repr(value) in str(refusal.value)

    @pytest.mark.parametrize("name", ["partition", "remainder"])
    def test_an_array_is_no_option(self, name: str) -> None:
        with pytest.raises(PlanError, match=f"^{name}="):
            cpattn.plan([(0, 4)], 2, **{name: np.array(["first", "zigzag"])})  # type: ignore[arg-type]

    def test_options_go_by_keyword(self) -> None:
        with pytest.raises(TypeError):
            cpattn.plan([(0, 4)], 2, "zigzag")  # type: ignore[call-arg]

    def test_rows_beyond_int32(self) -> None:
        with pytest.raises(PlanError, match=r"4 ranks of 1073741824 rows are 4294967296 rows; the limit is 2147483647.*lower pad_to"):
            cpattn.plan([(0, 1)], 4, pad_to=2**30)

    @pytest.mark.parametrize("cp_rank", [-1, 4, 2**40, 1.0, True, None, "0", np.array(1)], ids=repr)
    def test_bad_rank(self, cp_rank: Any) -> None:
        with pytest.raises(RankError, match=r"it must be an integer from 0 to 3 \(the plan's cp_size is 4\)") as refusal:
            cpattn.plan([(0, 9)], 4).metadata(cp_rank)
        assert f"cp_rank={cp_rank!r}" in str(refusal.value)
        with pytest.raises(RankError):
            cpattn.build_metadata([(0, 9)], 4, cp_rank)

    def test_build_metadata_refuses_what_plan_does(self) -> None:
        with pytest.raises(BatchError, match="request 0"):
            cpattn.build_metadata([(0, -1)], 4, 0)
        with pytest.raises(PlanError, match="cp_size=0"):
            cpattn.build_metadata([(0, 1)], 0, 0)
        with pytest.raises(PlanError, match="pad_to=0"):
            cpattn.build_metadata([(0, 1)], 2, 0, pad_to=0)

    def test_one_class_catches_all(self) -> None:
        assert issubclass(CPError, ValueError)
        assert all(issubclass(error, CPError) for error in (BatchError, PlanError, RankError))

    @given(pad_tos)
    def test_a_refused_plan_leaves_nothing_behind(self, pad_to: int) -> None:
        batch = [[0, 4], [1, -1]]
        with pytest.raises(BatchError):
            cpattn.plan(batch, 2, pad_to=pad_to)  # type: ignore[arg-type]
        assert batch == [[0, 4], [1, -1]]


def test_repr_says_what_matters() -> None:
    assert repr(cpattn.plan([(0, 9)] * 64, 4, partition="whole")) == (
        "Plan(64 requests, 576 tokens, cp_size=4, partition='whole', pad_to=1, rows=144)"
    )
    assert repr(cpattn.plan([(0, 9)] * 64, 4, pad_to=8)) == (
        "Plan(64 requests, 576 tokens, cp_size=4, partition='zigzag', remainder='balanced', pad_to=8, rows=144)"
    )
