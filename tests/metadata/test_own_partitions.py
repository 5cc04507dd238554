"""A caller's own partition: what is taken, what is refused and how it is named, and which plans are the same."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from inputs.own_partitions import OwnPartition
from inputs.strategies import Batch, batches, named_plan_options

import cpattn
from cpattn import Chunk, Chunks, PlanError
from cpattn.cli.plan import as_json
from cpattn.cli.traffic import Shape
from cpattn.metadata.batch import IntArray
from cpattn.viz import draw_plan_picture, draw_ring_picture, draw_work_picture, ring_as_text, ring_schedule, work_as_text

BATCH = [(3, 4), (0, 0), (7, 3)]
# Request 0 in three chunks of which rank 1 has two, request 2 whole on rank 1: rank 2 has nothing.
TABLE = [(0, 0, 1, 1), (0, 1, 2, 0), (0, 3, 1, 1), (2, 0, 3, 1)]


def chunks(table: Any, dtype: Any = np.int64) -> Chunks:
    return Chunks(*np.array(table, dtype=dtype).reshape(-1, 4).T)


def planned(table: Any = TABLE, **options: Any) -> cpattn.Plan:
    def mine(batch: IntArray, cp_size: int) -> Chunks:
        return chunks(table)

    return cpattn.plan(BATCH, 3, partition=mine, **options)


def test_a_plan_has_the_chunks_that_the_partition_gave() -> None:
    plan = planned(pad_to=4)
    assert plan.chunks == tuple(Chunk(*chunk) for chunk in TABLE)
    assert (plan.rank_tokens, plan.rank_chunks, plan.rows) == ((2, 5, 0), (1, 3, 0), 8)
    assert plan.rank_pairs == (5 + 6, 4 + 7 + 8 + 9 + 10, 0)
    assert plan.rank_extends.tolist() == [[2, 2, 0], [0, 0, 0], [0, 3, 0]]
    assert plan.most_chunks == 2
    assert plan.metadata(1).token_index.tolist() == [0, 3, 4, 5, 6, -1, -1, -1]
    assert plan.metadata(2).token_index.tolist() == [-1] * 8


def test_it_is_called_with_the_batch_and_the_number_of_ranks() -> None:
    def mine(batch: IntArray, cp_size: int) -> Chunks:
        assert batch.tolist() == [list(request) for request in BATCH]
        assert batch.dtype == np.int64
        assert type(cp_size) is int
        with pytest.raises(ValueError, match=r"read-only"):
            batch[0] = 1
        return chunks(TABLE)

    assert cpattn.plan(BATCH, np.int64(3), partition=mine) == planned()
    # One that needs the prefixes' owners, say, has them from elsewhere.
    with pytest.raises(ZeroDivisionError):
        cpattn.plan(BATCH, 3, partition=lambda batch, cp_size: 1 / 0)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("dtype", [np.int32, np.uint64, np.int8, ">i8"])
def test_integers_of_any_width(dtype: Any) -> None:
    assert cpattn.plan(BATCH, 3, partition=lambda batch, cp_size: chunks(TABLE, dtype)) == planned()


@pytest.mark.parametrize("convert", [tuple, list, lambda c: tuple(map(torch.from_numpy, c)), lambda c: [column.tolist() for column in c]])
def test_four_arrays_of_any_kind(convert: Callable[[Chunks], Any]) -> None:
    assert cpattn.plan(BATCH, 3, partition=lambda batch, cp_size: convert(chunks(TABLE))) == planned()


def test_an_array_is_neither_changed_nor_kept() -> None:
    mine = chunks(TABLE)
    plan = cpattn.plan(BATCH, 3, partition=lambda batch, cp_size: mine)
    mine.rank[:] = 0
    assert plan == planned()
    for column in plan.chunk_table:
        with pytest.raises(ValueError, match=r"read-only"):
            column[:] = 0


@given(batches(), named_plan_options())
def test_the_chunks_of_a_named_partition_may_be_given_as_one_s_own(batch: Batch, options: dict[str, Any]) -> None:
    named = cpattn.plan(batch, **options)
    own = cpattn.plan(batch, options["cp_size"], partition=lambda batch, cp_size: named.chunk_table, pad_to=options["pad_to"])
    assert own.chunks == named.chunks
    assert own != named
    assert own.fingerprint != named.fingerprint
    for rank in range(named.cp_size):
        mine, theirs = own.metadata(rank), named.metadata(rank)
        for name in ("cu_seqlens_q", "k_len", "k_start", "token_index", "position_ids", "restore_index"):
            assert torch.equal(getattr(mine, name), getattr(theirs, name))


def test_batches_without_a_new_token() -> None:
    for batch in ([], [(0, 0), (5, 0)]):
        tables: list[Any] = [chunks([]), ([], [], [], [])]
        for nothing in tables:
            plan = cpattn.plan(batch, 2, partition=lambda batch, cp_size, nothing=nothing: nothing)  # type: ignore[misc]
            assert (plan.chunks, plan.rows, plan.most_chunks) == ((), 0, 1)


class TestIdentity:
    def test_plans_are_equal_where_the_chunks_are(self) -> None:
        a, b = planned(), cpattn.plan(BATCH, 3, partition=lambda batch, cp_size: chunks(TABLE))
        assert a == b
        assert hash(a) == hash(b)
        assert a.fingerprint == b.fingerprint
        moved = [*TABLE[:-1], (2, 0, 3, 0)]
        for other in (planned(moved), planned(pad_to=2), cpattn.plan(BATCH, 3), planned(prefix_shards=[[3, 0, 0], [0] * 3, [7, 0, 0]])):
            assert a != other
            assert a.fingerprint != other.fingerprint

    def test_a_copy_has_the_chunks_and_not_the_function(self) -> None:
        plan = planned()
        assert plan.rank_pairs
        for other in (pickle.loads(pickle.dumps(plan)), copy.copy(plan), copy.deepcopy(plan), dataclasses.replace(plan)):
            assert other == plan
            assert hash(other) == hash(plan)
            assert other.fingerprint == plan.fingerprint
            assert repr(other) == repr(plan)
            with pytest.raises(ValueError, match=r"read-only"):
                other.chunk_table.rank[:] = 0
        assert dataclasses.replace(plan, pad_to=8).rows == 8
        with pytest.raises(PlanError, match=r"partition mine: request 0 is wrong: tokens 0 to 0 .* on rank 1; ranks are 0 to 0"):
            dataclasses.replace(plan, cp_size=1)
        meta = pickle.loads(pickle.dumps(plan.metadata(1)))
        assert meta.plan == plan

    def test_names(self) -> None:
        assert repr(planned()) == "Plan(3 requests, 7 tokens, cp_size=3, partition=mine, pad_to=1, rows=5)"
        assert planned().summary().splitlines()[1] == "3 ranks, mine partition, 5 rows a rank (a multiple of 1)"
        assert str(cpattn.plan(BATCH, 3, partition=OwnPartition(0)).partition) == "OwnPartition"
        assert str(cpattn.plan([], 3, partition=partial(lambda batch, cp_size: chunks([]))).partition) == "<lambda>"

    def test_what_is_only_of_partitions_that_cut_all_requests_alike(self) -> None:
        for name in ("chunk_rank", "lengths", "starts", "rank_columns", "local_starts"):
            with pytest.raises(PlanError, match=r"partition mine need not cut all requests alike; plan.chunk_table has the chunks of any"):
                getattr(planned(), name)
            with pytest.raises(PlanError, match=r"partition 'whole' need not cut all requests alike; plan.chunk_table has"):
                getattr(cpattn.plan(BATCH, 3, partition="whole"), name)

    def test_the_other_ways_to_a_plan(self) -> None:
        own = OwnPartition(3)
        plan = cpattn.plan(BATCH, 3, partition=own, pad_to=2)
        assert cpattn.required_rows(BATCH, 3, partition=own, pad_to=2) == plan.rows
        assert cpattn.build_metadata(BATCH, 3, 1, partition=own, pad_to=2).plan == plan
        pool = cpattn.KVPool(num_pages=8, page_size=4, num_layers=1, kv_heads=1, head_dim=8, cp_size=3, cp_rank=0, sharded=True)
        pool.admit("a")
        planned = [pool.plan([("a", 9)], partition=own), pool.plan([("a", 2)], partition=own)]
        assert planned[1].prefix_shards == (planned[0].rank_tokens,)


WRONG: dict[str, tuple[Any, str]] = {
    "nothing": (None, r"returned None \(NoneType\); a partition is called with"),
    "a string": ("zigzag", r"returned 'zigzag' \(str\)"),
    "a generator": (iter(chunks(TABLE)), r"returned <.*> \(tuple_iterator\)"),
    "three arrays": (chunks(TABLE)[:3], r"returned \(array.* \(tuple\)"),
    "floats": (Chunks(*(column.astype(float) for column in chunks(TABLE))), r"request is float64 of shape \(4,\)"),
    "bools": (chunks(TABLE)._replace(rank=np.zeros(4, dtype=bool)), r"rank is bool of shape \(4,\)"),
    "two axes": (chunks(TABLE)._replace(start=np.zeros((4, 1), dtype=int)), r"start is int64 of shape \(4, 1\)"),
    "a number": ((*chunks(TABLE)[:3], 0), r"rank is int64 of shape \(\)"),
    "ragged lists": (([[0], [0, 1]], [0], [0], [0]), r"request cannot be read as an array \(ValueError\)"),
    "on no device": ((*chunks(TABLE)[:3], torch.zeros(4, dtype=torch.int64, device="meta")), r"rank cannot be read as an array"),
    "other sizes": (chunks(TABLE)._replace(rank=np.zeros(3, dtype=int)), r"request has 4, start has 4, length has 4, rank has 3 entries"),
    "beyond int64": (chunks(TABLE)._replace(start=np.full(4, 2**64 - 1, dtype=np.uint64)), r"start holds 18446744073709551615 to"),
    "no chunk": (chunks([]), r"request 0 is wrong: tokens 0 to 3 of its 4 are missing"),
    "no first token": (chunks([(0, 1, 3, 0), TABLE[3]]), r"request 0 is wrong: tokens 0 to 0 of its 4 are missing"),
    "a gap": (chunks([(0, 0, 1, 0), (0, 2, 2, 0), TABLE[3]]), r"request 0 is wrong: tokens 1 to 1 of its 4 are missing"),
    "no last token": (chunks([(0, 0, 3, 0), TABLE[3]]), r"request 0 is wrong: tokens 3 to 3 of its 4 are missing"),
    "no last request": (chunks(TABLE[:3]), r"request 2 is wrong: tokens 0 to 2 of its 3 are missing"),
    "an overlap": (
        chunks([(0, 0, 2, 0), (0, 1, 3, 1), TABLE[3]]),
        r"request 0 is wrong: tokens 1 to 3 \(entry 1\) overlap those before.* 2;",
    ),
    "the same twice": (chunks([*TABLE, TABLE[3]]), r"request 2 is wrong: tokens 0 to 2 \(entry 4\) overlap"),
    "too long": (chunks([*TABLE[:3], (2, 0, 4, 1)]), r"request 2 is wrong: tokens 0 to 3 \(entry 3\) are out of range; the request has 3"),
    "a request without new tokens": (
        chunks([*TABLE[:3], (1, 0, 1, 0), TABLE[3]]),
        r"request 1 is wrong: tokens 0 to 0 .* has 0 new tokens",
    ),
    "a negative start": (chunks([(0, -1, 5, 0), TABLE[3]]), r"request 0 is wrong: tokens -1 to 3 \(entry 0\) are out of range"),
    "an empty chunk": (chunks([*TABLE[:2], (0, 3, 0, 0), *TABLE[2:]]), r"request 0 is wrong: entry 2 has a length of 0; leave out chunks"),
    "a rank too high": (
        chunks([*TABLE[:3], (2, 0, 3, 3)]),
        r"request 2 is wrong: tokens 0 to 2 \(entry 3\) are on rank 3; ranks are 0 to 2",
    ),
    "a negative rank": (chunks([*TABLE[:3], (2, 0, 3, -1)]), r"request 2 is wrong: .* on rank -1"),
    "a request too high": (chunks([*TABLE, (3, 0, 1, 0)]), r"entry 4 is of request 3, the batch has 3 requests"),
    "a negative request": (chunks([(-1, 0, 1, 0), *TABLE]), r"entry 0 is of request -1, the batch has 3 requests"),
    "requests in another order": (chunks([TABLE[3], *TABLE[:3]]), r"request 0 is wrong: tokens 0 to 3 of its 4 are missing"),
    "a request in two places": (
        chunks([*TABLE[:3], TABLE[3], (0, 0, 1, 0)]),
        r"request 0 is wrong: its entry 4 comes after one of request 2",
    ),
    "chunks by rank": (
        chunks([TABLE[1], TABLE[0], *TABLE[2:]]),
        r"request 0 is wrong: its chunks are not in order, their starts are \[1, 0, 3\]",
    ),
    "the first of two": (chunks([(0, 0, 3, 0), (2, 0, 3, 9)]), r"request 0 is wrong: tokens 3 to 3"),
}


@pytest.mark.parametrize(("given", "message"), [pytest.param(*case, id=name.replace(" ", "-")) for name, case in WRONG.items()])
def test_what_is_no_layout_of_the_batch(given: Any, message: str) -> None:
    def mine(batch: IntArray, cp_size: int) -> Any:
        return given

    for make in (cpattn.plan, cpattn.required_rows, partial(cpattn.build_metadata, cp_rank=0)):
        with pytest.raises(PlanError, match=f"partition mine:? {message}") as refusal:
            make(BATCH, 3, partition=mine)
        assert "by request and then by start, and each new token stands in one chunk" in str(refusal.value)


@given(batches(max_requests=4, max_extend=12), named_plan_options())
def test_a_table_with_one_number_changed_is_no_layout(batch: Batch, options: dict[str, Any]) -> None:
    """The quick look and the one that finds the words agree."""
    table = cpattn.plan(batch, **options).chunk_table
    for field in ("request", "start", "length"):
        for entry in range(len(table.rank)):
            for change in (-1, 1):
                column = getattr(table, field).copy()
                column[entry] += change
                wrong = table._replace(**{field: column})
                with pytest.raises(PlanError, match=r"is wrong|is of request"):
                    cpattn.plan(batch, options["cp_size"], partition=lambda batch, cp_size, wrong=wrong: wrong)  # type: ignore[misc]


def test_other_arguments_beside_it() -> None:
    with pytest.raises(PlanError, match=r"remainder='first' beside a partition of your own, which says itself where each token goes"):
        planned(remainder="first")
    with pytest.raises(PlanError, match=r"remainder='first' beside partition='whole', which says itself where each token goes"):
        cpattn.plan(BATCH, 3, partition="whole", remainder="first")
    with pytest.raises(
        PlanError, match=r"partition=3 is unknown; choose one of 'zigzag', 'contiguous', 'whole', 'uncut', or pass a function of"
    ):
        cpattn.plan(BATCH, 3, partition=3)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=r"3 ranks of 1073741824 rows are 3221225472 rows"):
        planned(pad_to=2**30)


class TestBuckets:
    BUCKET = cpattn.Bucket(max_requests=3, max_rows=8, max_chunks=4)

    def test_callers_partitions_may_follow_each_other(self) -> None:
        meta = planned().metadata(1, bucket=self.BUCKET)
        assert meta.restore_index.tolist() == [8, 0, 1, 9, 10, 11, 12] + [-1] * 17
        other = cpattn.plan(BATCH, 3, partition=OwnPartition(1))
        meta.copy_(other)
        fresh = other.metadata(1, bucket=self.BUCKET)
        assert torch.equal(meta.restore_index, fresh.restore_index)
        assert torch.equal(meta.token_index, fresh.token_index)

    def test_one_of_ours_and_a_caller_s_may_not(self) -> None:
        meta = planned().metadata(1, bucket=self.BUCKET)
        with pytest.raises(PlanError, match=r"""the plan has partition='zigzag', this metadata "a caller's"; a graph cannot"""):
            meta.copy_(cpattn.plan(BATCH, 3))

    def test_what_does_not_fit(self) -> None:
        assert planned().fits(self.BUCKET)
        assert not planned().fits(dataclasses.replace(self.BUCKET, max_chunks=2))
        with pytest.raises(PlanError, match=r"max_chunks is 2, the plan needs 3"):
            planned().metadata(0, bucket=dataclasses.replace(self.BUCKET, max_chunks=2))


@pytest.mark.parametrize("batch", [BATCH, [(2000, 900), (0, 300), (0, 0)]], ids=["token by token", "chunk by chunk"])
@pytest.mark.parametrize("shards", [False, True], ids=["", "sharded"])
def test_pictures(tmp_path: Path, batch: Batch, shards: bool) -> None:
    held = [[prefix_len, 0, 0] for prefix_len, _ in batch] if shards else None
    plan = cpattn.plan(batch, 3, partition=OwnPartition(5), prefix_shards=held)
    draw_plan_picture(plan, tmp_path / "plan.svg")
    draw_ring_picture(ring_schedule(plan), tmp_path / "ring.svg")
    draw_work_picture([plan], tmp_path / "work.svg")
    assert all((tmp_path / f"{name}.svg").stat().st_size for name in ("plan", "ring", "work"))
    assert work_as_text([plan]).startswith("OwnPartition partition: the busiest rank has")
    assert len(ring_as_text(ring_schedule(plan)).splitlines()) == 3 + 6
    found = as_json(plan, Shape(4, 2, 8, 8, "float32", 4))
    assert found["partition"] == "OwnPartition"
    assert sum(chunk["length"] for chunk in found["chunks"]) == plan.num_tokens
