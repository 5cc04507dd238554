"""New keys that a rank reads in its own rows: results are those of keys in one order, bit for bit, and rows of cut requests are all
that is copied."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs.cases import AttentionCase
from inputs.own_partitions import OwnPartition
from references.keys_in_place import in_place_backend
from torch import Tensor

import cpattn
from cpattn.costs.steps.tally import Most
from cpattn.exchange.key_order import Ordered, key_order
from cpattn.exchange.late_keys import late_tables
from cpattn.exchange.seen_keys import exchanged_rows
from cpattn.keys import PREFIX_UNIT, Keys
from cpattn.metadata.laid_out import LaidOut, Zigzag
from cpattn.metadata.own_keys import only_owners, rows_put
from cpattn.moves import torch_moves
from cpattn.options import AttentionOptions
from cpattn.spans import Spans
from cpattn.testing import run_loopback

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
UGLY = [0, 1, 2, 7, 127, 128, 129, 131, 256, 300]


def put_by_hand(plan: cpattn.Plan, rank: int) -> int:
    """Tokens of a rank that it copies, request by request."""
    total = 0
    for (prefix, extend), of_ranks in zip(plan.batch, plan.rank_extends.tolist(), strict=True):
        mine = of_ranks[rank]
        # Those of a request that is whole, up to where a block begins behind the cached keys.
        total += mine if mine < extend else min(mine, -prefix % PREFIX_UNIT)
    return total


@given(data=st.data(), cp_size=st.sampled_from([1, 2, 3, 5, 7]), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_results_have_the_bits_of_keys_in_one_order(data: st.DataObject, cp_size: int, seed: int) -> None:
    """Whatever brings the others', and with NaN in the rows that are padding."""
    lengths = st.sampled_from(UGLY) | st.integers(0, 90)
    case = AttentionCase(
        data.draw(st.lists(st.tuples(st.sampled_from([0, 0, *UGLY]), lengths), max_size=7)),
        window=data.draw(st.none() | st.integers(1, 200)),
        overlap=data.draw(st.sampled_from([1, 2])),
        seed=seed,
    )
    partition = data.draw(st.sampled_from(["zigzag", "contiguous", "whole", "uncut", "auto", OwnPartition(seed)]))
    plan = case.plan(cp_size, partition=partition, pad_to=data.draw(st.sampled_from([1, 4])))
    strategy: Any = "all_gather"
    if cp_size > 1 and case.overlap == 1 and data.draw(st.booleans()):
        strategy = cpattn.two_level(data.draw(st.sampled_from([d for d in range(1, cp_size + 1) if cp_size % d == 0])))
    seen: list[Keys] = []
    backend = in_place_backend(seen)

    def program(group: cpattn.Transport) -> list[tuple[Tensor, Tensor]]:
        return [case.on_rank(plan, group.rank, group, strategy, one) for one in ("reference", backend)]

    results = run_loopback(program, cp_size)
    case.check([got for _, got in results], plan, strategy, "reference")
    for expected, got in results:
        assert all(torch.equal(x, y) for x, y in zip(expected, got, strict=True))


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("offset", [0.0, 0.5], ids=["right", "wrong"])
def test_what_a_backend_returns_is_compared(window: int | None, offset: float) -> None:
    """By check=True, wherever the keys lie: cached ones, those of cut requests, and own rows."""
    case = AttentionCase([(0, 300), (130, 41), (0, 37), (128, 90), (259, 140)], window=window)
    plan = case.plan(2, partition="whole")
    seen: list[Keys] = []
    right = in_place_backend(seen)

    def attend(q: Tensor, keys: Keys, spans: Spans, options: AttentionOptions, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        out, lse = right.attend(q, keys, spans, options, out_dtype)
        return out, lse + offset

    def program(group: cpattn.Transport) -> None:
        case.on_rank(plan, group.rank, group, "all_gather", replace(right, attend=attend), check=True)

    if offset:
        with pytest.raises(cpattn.BackendError, match="differs from the reference"):
            run_loopback(program, 2)
    else:
        run_loopback(program, 2)
        assert all(keys.own is not None and keys.prefix is not None for keys in seen)


def test_values_in_keys_lie_in_one_place() -> None:
    """A backend that takes several places is not asked to take V from any of them."""
    case = AttentionCase([(0, 300), (130, 41), (0, 37), (128, 90)], v_in_k=True)
    plan = case.plan(2, partition="whole")
    seen: list[Keys] = []

    def program(group: cpattn.Transport) -> list[tuple[Tensor, Tensor]]:
        return [case.on_rank(plan, group.rank, group, "all_gather", one) for one in ("reference", in_place_backend(seen))]

    for expected, got in run_loopback(program, 2):
        assert all(torch.equal(x, y) for x, y in zip(expected, got, strict=True))
    assert seen
    assert all(keys.own is None and keys.prefix is None for keys in seen)


@pytest.mark.parametrize("waits", [False, True], ids=["before the attention", "beside it"])
def test_through_a_bucket(waits: bool) -> None:
    """Tables are as long as the bucket's, and each batch has its own in them."""
    batches = [[(0, 300), (0, 40), (0, 2)], [(0, 11)], [], [(0, 50), (0, 1), (0, 9), (0, 260), (0, 131)]]
    cases = [AttentionCase(batch, seed=seed) for seed, batch in enumerate(batches)]
    plans = [case.plan(3, partition=partition) for case, partition in zip(cases, ("whole", "zigzag", "uncut", "whole"), strict=True)]
    bucket = cpattn.Bucket(max_requests=8, max_rows=320, max_chunks=16)
    seen: list[Keys] = []

    def program(group: cpattn.Transport) -> list[tuple[Tensor, Tensor]]:
        meta = plans[-1].metadata(group.rank, bucket=bucket)
        outputs = []
        for case, plan in zip(cases, plans, strict=True):
            meta.copy_(plan)
            outputs.append(case.on_rank(plan, group.rank, group, "all_gather", in_place_backend(seen, waits=waits), meta=meta))
        return outputs

    for case, plan, *outputs in zip(cases, plans, *run_loopback(program, 3), strict=True):
        case.check(outputs, plan, "all_gather", "reference")
    assert {keys.own.places.shape for keys in seen if keys.own is not None} == {(16,)}
    assert all(keys.own is not None for keys in seen)


def bench_batches() -> dict[str, cpattn.Batch]:
    """Those of benchmarks/bench_partitions.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        from bench_partitions import BATCHES

    return dict(BATCHES) | {"ragged, cached": [(700 * i % 1000, 90 * i + 1) for i in range(12)]}


@pytest.mark.parametrize("cp_size", [2, 3, 8])
@pytest.mark.parametrize("partition", ["zigzag", "contiguous", "whole", "uncut", "auto"])
def test_rows_copied_are_those_of_requests_that_are_cut(partition: str, cp_size: int) -> None:
    for name, batch in bench_batches().items():
        plan = cpattn.plan(batch, cp_size, partition=partition)
        expected = [put_by_hand(plan, rank) for rank in range(cp_size)]
        assert rows_put(plan).tolist() == expected, name
        assert LaidOut(plan).put == Most.of(plan).put == max(expected)
        if partition == "zigzag":
            assert Zigzag(plan).put == max(expected)
        for rank in range(cp_size):
            meta = plan.metadata(rank)
            assert len(late_tables(meta, None, Ordered.NOT_IN_PLACE).places) == expected[rank]
            exchanged = exchanged_rows(meta, None, leaves_own=True)
            assert exchanged.own == expected[rank]
            order = key_order(meta, Ordered.NOT_IN_PLACE)
            received = sum(exchanged.received)
            cached = 0 if order.prefix_places is None else len(order.prefix_places)
            assert order.rows == expected[rank] + received + cached
        if partition == "uncut" and not any(prefix for prefix, _ in batch):
            assert not any(expected)


def test_a_call_copies_no_other_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over collectives: what is sent is packed and copied into messages, and put in order with what is received."""
    case = AttentionCase([(0, 300), (130, 41), (0, 37), (128, 90), (5, 0), *[(0, 64)] * 8])
    plan = case.plan(2, partition="whole")
    copied: list[int] = []

    def pack(message: Tensor, k: Tensor, v: Tensor, num_tokens: int, slots: Tensor | None = None, rows: Tensor | None = None) -> None:
        copied.append(num_tokens if slots is None else int((slots[:num_tokens] >= 0).sum()))
        # Of a cache, which may be long, no other rows are looked at.
        assert k.shape[0] == plan.rows or copied[-1] == num_tokens
        real_pack(message, k, v, num_tokens, slots, rows)

    def gather_rows(out: Tensor, source: Tensor, index: Tensor, slots: Tensor | None = None) -> None:
        copied.append(len(index))
        real_gather(out, source, index, slots)

    real_pack, real_gather = torch_moves.pack, torch_moves.gather_rows
    seen: list[Keys] = []
    expected = 0
    for rank in range(2):
        table = exchanged_rows(plan.metadata(rank), None, leaves_own=True)
        assert 0 < table.own < plan.rank_tokens[rank]
        expected += 2 * table.own + sum(table.sent) + sum(table.received)
        # Of what is cached, that which shares a block with new keys, where this rank sees it.
        seen_here = plan.rank_extends[:, rank] > 0
        expected += int((plan.prefix_lens % PREFIX_UNIT)[seen_here].sum())

    metas = [plan.metadata(rank) for rank in range(2)]
    rows = [[cpattn.shard(x, meta) for x in (case.q, case.k, case.v)] for meta in metas]

    def program(group: cpattn.Transport) -> None:
        meta, (q, k, v) = metas[group.rank], rows[group.rank]
        cpattn.cp_attention(q, k, v, meta, group=group, kv_cache=case.prefix, strategy="all_gather", backend=in_place_backend(seen))

    monkeypatch.setattr(torch_moves, "pack", pack)
    monkeypatch.setattr(torch_moves, "gather_rows", gather_rows)
    run_loopback(program, 2)
    assert sum(copied) == expected
    assert (only_owners(plan) >= 0).any()
