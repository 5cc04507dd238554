"""Which rows lie where, which come late, and in which order: against the layout of the batch read token by token."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs.cases import AttentionCase
from inputs.problems import problem as problem_like
from inputs.strategies import Batch, lengths
from references.keys_in_place import in_place_backend
from torch import Tensor

import cpattn
from cpattn.attention.registry import BACKENDS
from cpattn.call.choose import Choice
from cpattn.call.explain_arrival import explain_arrival
from cpattn.costs.decide import Decision
from cpattn.costs.ways import Call, Way
from cpattn.exchange import late_pages
from cpattn.exchange.all_gather import ALL_GATHER
from cpattn.exchange.gathered_rows import GatheredRows
from cpattn.exchange.key_order import Ordered, RequestRows, RowsOfRanks, key_order
from cpattn.exchange.late_keys import LateKeys, LateTables, late_tables
from cpattn.exchange.late_pages import may_come_late
from cpattn.exchange.message import KVFormat
from cpattn.exchange.page_places import places_in_order
from cpattn.exchange.step_spans import spans_in_order
from cpattn.exchange.strategy import Setup
from cpattn.exchange.traveling_keys import traveling_keys
from cpattn.kernels.arrival_layout import PIECE_ROWS
from cpattn.keys import NOT_HERE, PREFIX_UNIT, Keys
from cpattn.machine import H100
from cpattn.metadata.cp_metadata import CPMetadata
from cpattn.moves.late_rows import LateRows
from cpattn.moves.moves import moves_for
from cpattn.testing import run_loopback
from cpattn.transports.posted import OwnMemory
from cpattn.transports.transfer import Work
from cpattn.transports.transport import Transport

PARTITIONS = ["zigzag", "contiguous", "whole", "uncut"]


def token(request: Any, position: Any) -> Any:
    """A number by which a token of the batch is known."""
    return np.asarray(request) * 10**5 + position


def put_rows(meta: CPMetadata, tables: LateTables) -> tuple[np.ndarray, np.ndarray]:
    """Of a rank's rows those that it puts in its message, and where: a bucket's tables have room for all."""
    count, *rows = tables.own_rows.tolist()
    places = tables.places.tolist()
    assert len(rows) == len(places) == (count if meta.bucket is None else meta.rows)
    assert set(rows[count:]) | set(places[count:]) <= {-1}
    return np.array(rows[:count], dtype=int), np.array(places[:count], dtype=int)


def source_in_order(late: LateTables | LateRows) -> np.ndarray:
    """Of each row of the memory the row of all messages that comes there, or -1."""
    count, *pieces = late.order.tolist()
    in_turn, source = late.source.numpy().reshape(-1, PIECE_ROWS), np.full((len(pieces), PIECE_ROWS), -1)
    assert len(set(pieces[:count])) == count
    assert (in_turn[count:] == -1).all()
    source[pieces[:count]] = in_turn[:count]
    return source.ravel()


def memory_of(meta: CPMetadata, window: int | None, ordered: Ordered) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which token is in each row of a rank's memory at last, -1 for none, which of them come late, and which token is in each of its own
    rows. No row is put twice."""
    plan, order, tables = meta.plan, key_order(meta, ordered), late_tables(meta, window, ordered)
    gathered = np.full((plan.cp_size, meta.rows), -1)
    for chunk, first in zip(plan.chunks, plan.chunk_rows, strict=True):
        gathered[chunk.rank, first : first + chunk.length] = token(
            chunk.request, plan.prefix_lens[chunk.request] + chunk.start + np.arange(chunk.length)
        )
    # Each rank's message has its rows in its own order.
    messages = np.full((plan.cp_size, RowsOfRanks.of(meta, ordered).most), -1)
    for rank, there in enumerate(gathered):
        theirs = plan.metadata(rank, bucket=meta.bucket)
        rows, to = put_rows(theirs, late_tables(theirs, window, ordered))
        messages[rank, to] = there[rows]
    memory, source = np.full(order.rows, -1), source_in_order(tables)
    is_late = np.zeros(order.rows, dtype=bool)
    # What comes lies in the memory.
    assert (source[order.rows :] == -1).all()
    is_late[:] = source[: order.rows] >= 0
    memory[is_late] = messages.ravel()[source[: order.rows][is_late]]
    assert (memory[is_late] >= 0).all()
    rows, to = put_rows(meta, tables)
    assert (memory[to] == -1).all()
    memory[to] = gathered[meta.cp_rank][rows]
    if order.prefix_places is not None:
        cached = np.concatenate([token(i, np.arange(prefix)) for i, (prefix, _) in enumerate(plan.batch)])
        places = order.prefix_places.numpy()
        assert (memory[places] == -1).all()
        memory[places] = cached if order.prefix_rows is None else cached[order.prefix_rows.numpy()]
    return memory, is_late, gathered[meta.cp_rank]


def in_pieces(is_late: np.ndarray, source: Tensor) -> np.ndarray:
    """Of each piece whether some row of it is late."""
    padded: np.ndarray = np.pad(is_late, (0, len(source) - len(is_late)))
    return padded.reshape(-1, PIECE_ROWS).max(axis=1)  # type: ignore[no-any-return]


@given(
    batch=st.lists(st.tuples(lengths(20) | st.sampled_from([127, 128, 129, 300]), lengths(70)), min_size=1, max_size=6),
    cp_size=st.sampled_from([1, 2, 3, 5]),
    partition=st.sampled_from(PARTITIONS),
    pad_to=st.sampled_from([1, 8]),
    window=st.none() | st.integers(1, 90),
    ordered=st.sampled_from(Ordered),
    bucket=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_what_a_span_reaches_is_there_and_nothing_else_is_waited_for(
    batch: Batch, cp_size: int, partition: str, pad_to: int, window: int | None, ordered: Ordered, bucket: bool
) -> None:
    if bucket:
        batch = [(0, extend) for _, extend in batch]
    plan = cpattn.plan(batch, cp_size, partition=partition, pad_to=pad_to)
    starts = np.cumsum(plan.prefix_lens) - plan.prefix_lens
    everything = np.concatenate([token(i, prefix + np.arange(extend)) for i, (prefix, extend) in enumerate(batch)])
    if bucket and ordered is Ordered.ALL_NEW:
        ordered = Ordered.SEEN  # pages that a bucket knows too little of
    for rank in range(cp_size):
        meta = plan.metadata(rank, bucket=cpattn.Bucket(8, plan.rows + 8, 64) if bucket else None)
        order, tables = key_order(meta, ordered), late_tables(meta, window, ordered)
        memory, is_late, own_rows = memory_of(meta, window, ordered)
        reached = np.zeros(order.rows, dtype=bool)
        kept = np.zeros((len(batch), 2), dtype=int) if order.kept is None else order.kept.numpy().reshape(-1, 2)
        own = np.full((len(batch), 2), NOT_HERE) if order.own is None else order.own.numpy().reshape(-1, 2)
        whole = (plan.rank_extends[:, rank] == plan.extend_lens) & (plan.extend_lens > 0)
        for _, q_len, k_start, k_len, diagonal, request in zip(*spans_in_order(meta, ordered).host, strict=True):
            # Each query sees the keys before the next one's own, and those form one range for the chunk.
            first = 0 if window is None else max(0, diagonal - window)
            keys = np.arange(first, min(k_len, diagonal + q_len - 1) if q_len else 0)
            in_own = keys[keys >= own[request, 0]]
            assert (own_rows[own[request, 1] + in_own] == token(request, in_own)).all()
            # Of a request that no other rank has a part of no more has rows than what shares a block with cached keys.
            assert (
                ordered is not Ordered.NOT_IN_PLACE
                or not whole[request]
                or (keys[: len(keys) - len(in_own)] < next_unit(plan, request)).all()
            )
            here = keys[(keys >= kept[request, 0]) & (keys < own[request, 0])]
            assert (memory[k_start + here] == token(request, here)).all()
            reached[k_start + here] = True
            # All others are where they lie in the cache.
            stay = keys[keys < kept[request, 0]]
            assert not len(stay) or kept[request, 1] == starts[request]
            assert (stay < plan.prefix_lens[request]).all()
        assert (kept[:, 0] % PREFIX_UNIT == 0).all()
        assert (own[:, 0] % PREFIX_UNIT == 0).all()
        assert ordered is Ordered.NOT_IN_PLACE or order.own is None
        assert ordered is not Ordered.SEEN or not kept.any()
        # What nobody sees is not waited for, and does not come but for the pages.
        brought, awaited = in_pieces(is_late, tables.source), in_pieces(is_late & reached, tables.source)
        assert tables.late.tolist() == awaited.tolist()
        count, *pieces = tables.order.tolist()
        assert sorted(pieces[:count]) == np.flatnonzero(brought).tolist()
        assert sorted(pieces[: awaited.sum()]) == np.flatnonzero(awaited).tolist()
        assert all(piece < 0 for piece in pieces[count:])
        if ordered is Ordered.ALL_NEW:
            assert np.isin(everything, memory).all()
        else:
            assert (reached | ~is_late).all()
            # Of other requests, and behind its queries, a rank's memory has nothing.
            assert bucket or window is not None or reached.sum() == order.rows


def next_unit(plan: cpattn.Plan, request: int) -> int:
    """The first key behind the cached ones of a request at which a block begins."""
    return -(-int(plan.prefix_lens[request]) // PREFIX_UNIT) * PREFIX_UNIT


def test_the_longest_request_comes_first_and_in_it_the_last_keys() -> None:
    plan = cpattn.plan([(0, 128), (0, 1024), (0, 1024)], 2)
    count, *order = late_tables(plan.metadata(0), None, Ordered.SEEN).order.tolist()
    # Rank 0 has the first and the last quarter of each request, rank 1 those between.
    rows = [*range(896, 384, -1), *range(1920, 1408, -1), *range(96, 32, -1)]
    assert order[:count] == [row // PIECE_ROWS - 1 for row in rows[::PIECE_ROWS]]


@pytest.mark.parametrize(
    ("tokens", "changes", "expected"),
    [
        (8192, {}, True),
        (8193, {}, False),
        (16384, {"kv_heads": 4}, True),
        (600, {"head_dim": 192}, False),
        (600, {"v_head_dim": 192}, False),
    ],
)
def test_which_messages_come_by_programs_beside_those_of_the_attention(tokens: int, changes: dict[str, Any], expected: bool) -> None:
    """Those of up to 32 MiB, where that has registers to spare: with wider heads it has none."""
    meta = cpattn.plan([(0, tokens)], 2).metadata(0)
    problem = problem_like("cpu", torch.bfloat16, rows=meta.rows, **({"head_dim": 128, "v_head_dim": 128} | changes))
    sent: list[LateRows] = []
    transport = cpattn.LoopbackGroup(2).transport(0)

    def noted(rows: int, like: Tensor, late: LateRows, fill_missing: Any) -> object:
        sent.append(late)
        return object()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transport, "late_rows", noted)
        keys = LateKeys.of(Setup(problem, meta, transport, False, waits_for_keys=True), KVFormat.of(problem))
    assert keys is not None
    assert sent[0].side_by_side is keys.arrivals.side_by_side is expected


def test_another_batch_in_a_bucket_has_its_own() -> None:
    bucket = cpattn.Bucket(max_requests=4, max_rows=64, max_chunks=8)
    first, second = (cpattn.plan(batch, 2) for batch in ([(0, 100), (0, 20)], [(0, 30), (0, 5), (0, 60)]))
    meta = first.metadata(1, bucket=bucket)
    tables = late_tables(meta, None, Ordered.SEEN)
    meta.copy_(second)
    fresh = second.metadata(1, bucket=bucket)
    for mine, theirs in zip(tables, late_tables(fresh, None, Ordered.SEEN), strict=True):
        assert mine.tolist() == theirs.tolist()


def test_what_says_which_keys_are_there_is_made_with_the_metadata() -> None:
    """Not in memory that is made anew while a graph captures, which says anything until it replays. It counts on, batch after batch and
    after a release; calls over another group count by themselves."""
    bucket = cpattn.Bucket(max_requests=4, max_rows=64, max_chunks=8)
    meta = cpattn.plan([(0, 100), (0, 20)], 2).metadata(1, bucket=bucket)
    group, other = (cpattn.LoopbackGroup(2).transport(1) for _ in range(2))

    def flags(transport: Transport) -> Tensor:
        problem = problem_like("cpu", rows=meta.rows, fixed=True)
        late = LateKeys.of(Setup(problem, meta, transport, False, waits_for_keys=True), KVFormat.of(problem))
        assert late is not None
        return late.arrivals.flags

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Transport, "late_rows", late_rows)
        first = flags(group)
        assert not first.any()
        first.fill_(3)
        group.release()
        meta.copy_(cpattn.plan([(0, 30), (0, 5), (0, 60)], 2))
        assert flags(group).data_ptr() == first.data_ptr()
        assert (first == 3).all()
        assert not flags(other).any()


def test_cached_rows_are_numbered_where_some_have_no_place() -> None:
    """A table of all of them would be as long as the cache."""
    batch = [(300, 5), (256, 3)]
    every = key_order(cpattn.plan(batch, 1).metadata(0), Ordered.SEEN)
    assert every.prefix_rows is None
    assert every.prefix_places is not None
    assert len(every.prefix_places) == 556
    some = key_order(cpattn.plan(batch, 2, partition="uncut").metadata(1), Ordered.SEEN)
    assert some.prefix_rows is not None
    assert some.prefix_rows.tolist() == [*range(300, 556)]


def test_prefixes_in_place() -> None:
    """What shares a block with keys of the other kind is put in order, and all else is read where it lies; of a request without new tokens
    nothing is put."""
    batch = [(300, 5), (0, 7), (256, 3), (40, 0)]
    meta = cpattn.plan(batch, 1).metadata(0)
    order = key_order(meta, Ordered.NOT_IN_PLACE)
    assert order.rows == 44 + 5
    assert RequestRows.of(meta, Ordered.NOT_IN_PLACE).k_starts.tolist() == [-256, 49, 49 - 256, 49]
    assert order.kept is not None
    assert order.kept.tolist() == [256, 0, 0, 300, 256, 300, 0, 556]
    assert order.prefix_rows is not None
    assert order.prefix_rows.tolist() == [*range(256, 300)]
    assert order.prefix_places is not None
    assert order.prefix_places.tolist() == [*range(44)]
    assert order.new_places is not None
    assert order.new_places.tolist() == [*range(44, 49)]
    assert order.own_places is not None
    rows = order.own_places.tolist()
    assert rows[:5] == [*range(44, 49)]
    assert all(row < 0 for row in rows[5:])
    # From which key on rows are read, and where key 0 would be: that of rows 0, 5, 12 and 15 is the first new one.
    assert order.own is not None
    assert order.own.tolist() == [384, -300, 0, 5, 256, 12 - 256, NOT_HERE, 0]


class RowsReadLate(GatheredRows):
    """:class:`cpattn.transports.rows_of_all.LateRowsOfPeers`, as far as results go: what a GPU's kernels do with the same tables."""

    def __init__(self, transport: Transport, kv: KVFormat, memory: Tensor, late: LateRows) -> None:
        super().__init__(transport, kv, memory)
        self._late = late
        self.memory = OwnMemory(self._own.view(-1).view(torch.uint8))
        gather = self.transfer
        self.transfer = gather._replace(begin=lambda transport, *arguments: Work(partial(self._bring, gather.begin(transport, *arguments))))

    def put(self, k: Tensor, v: Tensor | None, num_tokens: int | Tensor) -> None:
        self._own.fill_(torch.nan)
        assert v is not None
        count = int(self._late.own_rows[0])
        rows, places = self._late.own_rows[1 : 1 + count].long(), self._late.places[:count]
        moves_for(k.device).pack(self._own, k[rows], v[rows], count, places)

    def _bring(self, gathering: Work) -> None:
        gathering.wait()
        source = torch.from_numpy(source_in_order(self._late))[: len(self._own)]
        self._own[: len(source)][source >= 0] = self.all.whole[source[source >= 0]]


def late_rows(transport: Transport, rows: int, like: Tensor, late: LateRows, fill_missing: Any) -> RowsReadLate:
    """In the place of :meth:`Transport.late_rows`."""
    _, heads, width = like.shape
    memory = transport.arena.buffer("read", (transport.size * rows, heads, width), like.dtype, like.device)
    return RowsReadLate(transport, KVFormat(heads, width // 2, width // 2, False, like.dtype, like.device), memory, late)


def rows_of_all(transport: Transport, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, fill_missing: Any) -> Any:
    """In the place of :meth:`Transport.rows_of_all`: that there are such."""
    return object()


@pytest.mark.parametrize("bucket", [None, cpattn.Bucket(8, 64, 64)], ids=["exact", "bucket"])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("partition", PARTITIONS)
def test_attention_over_late_keys_and_prefixes_in_place(
    partition: str, window: int | None, bucket: cpattn.Bucket | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bits are those over collectives, in a memory that holds NaN where nothing was put: no query sees that."""
    prefixes = (300, 0, 7, 128, 0, 129) if bucket is None else (0,) * 6
    case = AttentionCase([*zip(prefixes, (54, 5, 0, 50, 6, 1), strict=True)], window=window)
    plan = case.plan(3, partition=partition, pad_to=4)
    seen: list[Keys] = []
    backend = in_place_backend(seen, waits=True)

    def attend(group: cpattn.Communicator, backend: Any) -> tuple[Tensor, Tensor]:
        meta = plan.metadata(group.rank, bucket=bucket)
        q, k, v = (cpattn.shard(x, meta) for x in (case.q, case.k, case.v))
        kv_cache = case.prefix if bucket is None else None
        return cpattn.cp_attention(
            q, k, v, meta, group=group, kv_cache=kv_cache, strategy="all_gather", backend=backend, window=window, return_lse=True
        )

    expected = run_loopback(lambda group: attend(group, "reference"), 3)
    monkeypatch.setattr(Transport, "rows_of_all", rows_of_all)
    monkeypatch.setattr(Transport, "late_rows", late_rows)
    for mine, theirs in zip(run_loopback(lambda group: attend(group, backend), 3), expected, strict=True):
        assert torch.equal(mine[0], theirs[0])
        assert torch.equal(mine[1], theirs[1])
    assert any(keys.prefix is not None for keys in seen) == (bucket is None)
    # A bucket's are of its size, whatever they hold.
    assert any(keys.arrivals is not None for keys in seen) == (partition != "uncut" or bucket is not None)
    # A bucket's launches are alike, and else those that have some beside cached keys or others'.
    in_own = [keys.own is not None for keys in seen]
    assert all(in_own) if bucket is not None else any(in_own) == (partition in ("whole", "uncut"))


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("partition", PARTITIONS[:3])
@pytest.mark.parametrize("prefixes", [(0,) * 6, (300, 0, 7, 128, 0, 129), (64, 0, 128, 0, 0, 256)], ids=["none", "any", "whole units"])
def test_late_keys_and_prefixes_in_pages(
    partition: str, window: int | None, prefixes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bits are those over collectives, and in the end every rank's pages have all new tokens, and nothing else has changed there."""
    extends = (54, 5, 0, 50, 6, 1)
    case = AttentionCase([*zip(prefixes, extends, strict=True)], window=window, cache="paged")
    plan = case.plan(3, partition=partition, pad_to=4)
    seen: list[Keys] = []
    backend = in_place_backend(seen, waits=True)

    def results(backend: Any) -> list[tuple[Tensor, Tensor]]:
        return run_loopback(lambda group: case.on_rank(plan, group.rank, group, "all_gather", backend), 3)

    expected = results("reference")
    monkeypatch.setattr(late_pages, "_LATE_TOKENS", 1)
    monkeypatch.setattr(late_pages, "_CACHED_PART", 0)
    monkeypatch.setattr(Transport, "rows_of_all", rows_of_all)
    monkeypatch.setattr(Transport, "late_rows", late_rows)
    for mine, theirs in zip(results(backend), expected, strict=True):
        assert torch.equal(mine[0], theirs[0])
        assert torch.equal(mine[1], theirs[1])
    assert all(keys.arrivals is not None and keys.own is None for keys in seen)
    assert any(keys.prefix is not None for keys in seen) == any(prefix >= PREFIX_UNIT for prefix in prefixes)


@pytest.mark.parametrize(
    ("batch", "cp_size", "late"),
    [
        ([(0, 4096)], 2, True),
        ([(0, 4095)], 2, False),
        ([(8000, 2048), (100, 2048)], 2, True),
        ([(8000, 4096)] + [(1001, 1)] * 255, 4, False),  # a prefill among decodes, whose cached keys would be put beside
        ([(8000, 4096)] + [(1001, 0)] * 255, 4, True),
        ([(0, 2500), (0, 2500)], 2, False),  # whole
        ([(0, 8192)], 1, False),
    ],
)
def test_which_batches_come_late(batch: list[tuple[int, int]], cp_size: int, late: bool) -> None:
    plan = cpattn.plan(batch, cp_size, partition="whole")
    problem = replace(AttentionCase([(9, 3)], cache="paged").problem(plan), rows=plan.rows)
    assert may_come_late(problem, plan, traveling_keys(problem, plan)) == late
    # A bucket's metadata cannot say how many cached keys there are.
    problem = replace(problem, fixed=True)
    assert not may_come_late(problem, plan, traveling_keys(problem, plan))


@pytest.mark.parametrize(
    ("changes", "batch", "waits", "said"),
    [
        ({}, [(0, 64)], True, "; beside the attention"),
        ({}, [(0, 64)], False, "; before the attention, as 'some' cannot wait for keys within a launch"),
        ({"overlap": 2}, [(0, 64)], True, "; before the attention to each group of heads, as overlap= divides them"),
        ({"cache": "paged", "page_size": 16}, [(0, 5000)], True, "; beside the attention"),
        (
            {"cache": "paged", "page_size": 16},
            [(0, 64)],
            True,
            "; into the pages before the attention, as 64 new tokens are fewer than 4,096",
        ),
        (
            {"cache": "paged", "page_size": 16, "fixed": True},
            [(0, 5000)],
            True,
            "; into the pages before the attention, as how many cached keys have to be put beside them changes with a bucket's batch",
        ),
        (
            {"cache": "paged", "page_size": 16},
            [(8000, 4096)] + [(1001, 1)] * 255,
            True,
            "; into the pages before the attention, as 26,839 cached keys would have to be put beside 4,351 new ones",
        ),
        ({}, [(0, 64)] * 2, True, ""),  # whole, so that nothing travels
    ],
    ids=str,
)
def test_explain_says_whether_keys_come_beside_the_attention(
    changes: dict[str, Any], batch: list[tuple[int, int]], waits: bool, said: str
) -> None:
    plan = cpattn.plan(batch, 2, partition="whole" if len(batch) == 2 else "zigzag")
    problem = replace(problem_like("cpu", rows=plan.rows), **changes)
    backend = replace(BACKENDS["reference"], name="some", waits_for_keys=lambda problem: waits, reads_in_place=lambda problem: True)
    schedule = ALL_GATHER.schedule(problem, plan)
    way = Way(ALL_GATHER, lambda: schedule, backend)
    for transport in ("peer_memory", "collectives"):
        choice = Choice(problem, ALL_GATHER, schedule, backend, Decision(way, Call(plan, problem, H100, transport, {}), ()))
        assert explain_arrival(choice, plan) == (said if transport == "peer_memory" else "")


def test_only_cached_keys_that_a_rank_sees_are_copied() -> None:
    """Of requests without new tokens the table is not looked at, and nor is it for what other ranks attend to."""
    plan = cpattn.plan([(200, 0), (130, 5), (300, 6), (5, 200)], 2, partition="uncut")
    for rank in range(2):
        meta = plan.metadata(rank)
        own = {plan.chunk_table.request[entry] for entry in plan.by_rank.entries(rank)}
        places = places_in_order(meta)
        assert places.cached is not None
        assert places.cached_rows is not None
        request, position = (part.numpy() for part in places.cached)
        expected = [(i, p) for i, (prefix, new) in enumerate(plan.batch) if new and i in own for p in range(prefix // 128 * 128, prefix)]
        assert [*zip(request.tolist(), position.tolist(), strict=True)] == expected
        # Each in the row before the new keys of its request.
        starts = RequestRows.of(meta, Ordered.ALL_NEW)
        rows = [starts.begins[i] + p - starts.kept[i] for i, p in expected]
        assert places.cached_rows.tolist() == rows
