"""Messages through the memory of other ranks' GPUs, beside the same over NCCL."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from inputs.cases import AttentionCase
from programs import page_programs
from programs import peer_programs as programs

import cpattn
from cpattn.testing import ProcessRanks

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="each rank needs a GPU of its own")


@pytest.fixture(scope="module")
def ranks() -> Iterator[ProcessRanks]:
    with ProcessRanks(min(4, torch.cuda.device_count()), timeout=120, transport="nccl") as started:
        yield started


BATCHES = [
    [(0, 777), (640, 300), (0, 3), (997, 1), (64, 0)],
    [(0, 1)],
    [(5, 0), (0, 1), (33, 2)],
    [(0, 13)] * 7,
]


@pytest.mark.parametrize("strategy", ["all_gather", "ring"])
@pytest.mark.parametrize("cache", ["packed", "paged"])
def test_bits_are_those_of_nccl(ranks: ProcessRanks, strategy: str, cache: str) -> None:
    compare(ranks, [case_of(batch, cache) for batch in BATCHES], strategy)


@pytest.mark.parametrize("cache", ["packed", "paged"])
def test_bits_are_those_of_nccl_for_short_and_long_messages(ranks: ProcessRanks, cache: str) -> None:
    """Those of up to 32 MiB come by other programs, and the attention beside them has fewer registers. Into pages keys come late from 4,096
    tokens on, so that a message of few bytes has narrow rows, and one of more than that on every rank many heads."""
    least = 4096 if cache == "paged" else 500
    narrow, wide = (replace(case_of([(0, least), (70, 333)], cache), kv_heads=heads, head_dim=dim) for heads, dim in ((1, 64), (8, 128)))
    compare(ranks, [narrow, wide, replace(wide, batch=[(0, 1100), (0, 3000)], heads=32, kv_heads=32)], "all_gather")


@pytest.mark.parametrize("cache", ["packed", "own packed", "own pages"])
def test_bits_are_those_of_nccl_where_heads_are_divided(ranks: ProcessRanks, cache: str) -> None:
    compare(ranks, [case_of(batch, cache) for batch in BATCHES], "ulysses")
    uneven = AttentionCase([(0, 333), (20, 40)], heads=7, kv_heads=7, head_dim=64, dtype=torch.bfloat16, device="cuda", cache=cache)
    compare(ranks, [uneven], "ulysses")


@pytest.mark.parametrize("strategy", ["ring", "pass_q", "pass_q_ring"])
def test_bits_are_those_of_nccl_over_a_sharded_cache(ranks: ProcessRanks, strategy: str) -> None:
    compare(ranks, [case_of(batch, "sharded") for batch in BATCHES], strategy)


@pytest.mark.parametrize(("head_dim", "dtype"), [(80, torch.float32), (72, torch.float16), (40, torch.bfloat16), (256, torch.bfloat16)])
def test_odd_widths(ranks: ProcessRanks, head_dim: int, dtype: torch.dtype) -> None:
    case = AttentionCase([(3, 130), (0, 17)], heads=3, kv_heads=3, head_dim=head_dim, dtype=dtype, device="cuda")
    for strategy in ("all_gather", "ring"):
        compare(ranks, [case], strategy)


@pytest.mark.parametrize("cache", ["packed", "paged"])
@pytest.mark.parametrize("window", [None, 100])
def test_only_rows_that_are_needed_are_read(ranks: ProcessRanks, window: int | None, cache: str) -> None:
    """The bits of the uneven all-to-all; over whole requests nothing is read or sent. Into pages the rest comes after the attention."""
    batches = [[(9, 1500), *[(9, 400)] * 9], [(7, 64)] * 8, [(0, 333)]]
    cases = [replace(case_of(batch, cache), window=window) for batch in batches]
    compare(ranks, cases, "all_gather", "whole")


@pytest.mark.parametrize(
    ("strategy", "cache", "window"), [("all_gather", "ranked", 100), ("all_gather", "striped", 100), ("pass_q", "striped", None)]
)
def test_what_is_wanted_over_a_sharded_cache_is_read(ranks: ProcessRanks, strategy: str, cache: str, window: int | None) -> None:
    """What queries see or a rank is to hold, with a window's reach beside new keys; of the last batch nearly all."""
    prefix = 130 if window else 0
    batches = [[(prefix, 1500), *[(prefix, 400)] * 9], [(prefix, 64)] * 8, [(prefix, 40)]]
    compare(ranks, [replace(case_of(batch, cache), window=window) for batch in batches], strategy, "whole")


@pytest.mark.parametrize("strategy", ["ring", "pass_q", "pass_q_ring"])
@pytest.mark.parametrize("window", [None, 100])
def test_rings_and_pass_q_read_what_is_needed(ranks: ProcessRanks, strategy: str, window: int | None) -> None:
    """One rank more than another, some nothing, and of the last batch nobody anything."""
    batches = [[(9, 1500), *[(9, 400)] * 9], [(0, 40), (0, 333), (8, 900), (0, 700)], [(7, 64)] * 8]
    cases = [replace(case_of(batch, "packed"), window=window) for batch in batches]
    compare(ranks, cases, strategy, "whole")


@pytest.mark.parametrize("strategy", ["ring", "pass_q", "pass_q_ring"])
def test_a_graph_replays_what_is_needed_of_whole_requests(ranks: ProcessRanks, strategy: str) -> None:
    for differences in ranks.run(programs.replay, strategy, 3, 8, "whole"):
        assert differences == [0.0] * 8


@pytest.mark.parametrize("window", [None, 100])
def test_graphs_bring_the_rest_into_pages(ranks: ProcessRanks, window: int | None) -> None:
    """Of a batch each, and one of a bucket that replays zigzag, whole and mixed batches, in which reads are exact, too."""
    for bucket in (False, True):
        for same in ranks.run(page_programs.replay_into_pages, "peer_memory", window, bucket):
            assert all(same), same


@pytest.mark.parametrize(("strategy", "cache"), [("all_gather", "packed"), ("ring", "packed"), ("pass_q", "sharded")])
@pytest.mark.parametrize("backend", ["torch_flash", "flash_attn4"])
def test_bits_are_those_of_nccl_with_kernels_of_packages(ranks: ProcessRanks, backend: str, strategy: str, cache: str) -> None:
    """Which are launched again for further layers as a whole."""
    unavailable = cpattn.BACKENDS[backend].unavailable()
    if unavailable:
        pytest.skip(unavailable)
    compare(ranks, [case_of(batch, cache) for batch in BATCHES], strategy, backend=backend)


def compare(ranks: ProcessRanks, cases: list[AttentionCase], strategy: str, partition: str = "zigzag", backend: str = "triton") -> None:
    by_rank = ranks.run(programs.attend_over_both, cases, strategy, backend, partition)
    for n, case in enumerate(cases):
        assert all(results[n][1] for results in by_rank), case.batch
        plan = case.plan(ranks.size, pad_to=8, partition=partition)
        outputs = [(out.cuda(), lse.cuda()) for (out, lse), _ in (results[n] for results in by_rank)]
        case.check(outputs, plan, strategy, backend, rounded_partials=backend != "triton" and strategy != "all_gather")


def case_of(batch: list[tuple[int, int]], cache: str) -> AttentionCase:
    return AttentionCase(batch, heads=8, kv_heads=2, head_dim=64, dtype=torch.bfloat16, device="cuda", cache=cache, page_size=16)


@pytest.mark.parametrize("strategy", ["all_gather", "ring", "ulysses"])
@pytest.mark.parametrize("calls", [1, 3])
def test_a_graph_replays_it(ranks: ProcessRanks, strategy: str, calls: int) -> None:
    for differences in ranks.run(programs.replay, strategy, calls, 8):
        assert differences == [0.0] * 8


def test_a_graph_replays_ranks_that_need_nothing_of_others(ranks: ProcessRanks) -> None:
    """The first rank's queries see its own keys alone, and the others read them."""
    for differences in ranks.run(programs.replay, "all_gather", 3, 8, "contiguous"):
        assert differences == [0.0] * 8


@pytest.mark.parametrize("strategy", ["all_gather", "ring", "pass_q"])
def test_a_graph_of_a_bucket_replays_other_batches(ranks: ProcessRanks, strategy: str) -> None:
    for same in ranks.run(programs.replay_a_bucket, strategy):
        assert all(same), same


def test_two_groups_of_the_same_gpus_do_not_wait_for_each_other(ranks: ProcessRanks) -> None:
    for same in ranks.run(programs.two_groups_at_once, 20):
        assert all(same), same


def test_memory_grows(ranks: ProcessRanks) -> None:
    assert all(ranks.run(programs.grow_and_shrink, [100, 30_000, 77, 70_000, 100]))


def test_what_finds_no_memory_goes_over_collectives(ranks: ProcessRanks) -> None:
    """Also with ``check``, whose verdicts have been sent by then; smaller calls stay where they were."""
    for same, places, says in ranks.run(programs.without_memory):
        assert all(same)
        assert {True, False} <= set(places)
        assert f"rank {ranks.size - 1} could not make" in says


def test_batches_of_several_sizes_take_turns(ranks: ProcessRanks) -> None:
    """What says which keys have come is memory that they share: none may take another's turn for its own."""
    batches = [[(0, 40)], [(0, 3000), (0, 500)], [(0, 700)]]
    for same in ranks.run(programs.take_turns, batches, [1, 1, 2, 1, -1, 2, 2, 2, -1, 0, 0, -1, 1, -2, 0, -2, -1, 2]):
        assert all(same), same


@pytest.mark.parametrize("captures", [False, True], ids=["eager", "graph"])
def test_strategies_take_turns(ranks: ProcessRanks, captures: bool) -> None:
    """A post is waited for at the end of the call before it, or where that was of another kind at its own beginning; and prefixes are put
    beside rows that others may still be reading."""
    late, ring, both = ("all_gather", [(0, 900), (0, 33)]), ("ring", [(0, 1500)]), ("all_gather", [(300, 700), (5, 40)])
    for same in ranks.run(programs.change_ways, [late, late, ring, both, ring, late, both, both, late], 12, captures):
        assert all(same), same


def test_it_is_what_auto_takes(ranks: ProcessRanks) -> None:
    for says in ranks.run(programs.attend_by_default):
        assert says == f"auto: its {ranks.size} ranks read the memory of each other's GPUs"


def test_a_rank_that_stays_away_is_named(ranks: ProcessRanks) -> None:
    *others, last = ranks.run(programs.stay_away, 2.0)
    missing = f"rank {ranks.size - 1} did not post or read a message within 2 s"
    for is_nan, said, late, seconds in others:
        assert is_nan
        assert missing in said
        assert missing in late
        assert 2 <= seconds < 20
    assert missing in last[2]


def test_who_only_replays_graphs_is_told_of_a_rank_that_stays_away(ranks: ProcessRanks) -> None:
    """At once after the first time, and by the memory that the graph has captured, which calls no longer use."""
    *others, _ = ranks.run(programs.replay_without_one, 2.0)
    for is_nan, told, said, (first, second) in others:
        assert is_nan
        assert f"rank {ranks.size - 1} did not post or read a message within 2 s" in told
        assert told == said
        assert 2 <= first < 20
        assert second < 1


def test_a_rank_of_another_plan_is_named(ranks: ProcessRanks) -> None:
    for is_nan, said in ranks.run(programs.of_other_sizes):
        assert is_nan
        assert "has posted another message" in said


def test_tensors_need_not_be_on_the_current_device(ranks: ProcessRanks) -> None:
    assert all(ranks.run(programs.on_another_device))


@pytest.mark.parametrize("strategy", ["all_gather", "ring"])
def test_each_axis_of_a_mesh_has_memory_of_its_own(ranks: ProcessRanks, strategy: str) -> None:
    if ranks.size % 2:
        pytest.skip("it takes two times so many GPUs")
    reads = "ranks read the memory of each other's GPUs"
    for results in ranks.run(programs.along_mesh_axes, [case_of(batch, "packed") for batch in BATCHES[:2]], strategy):
        assert all(same for same, _ in results)
        said = {says for _, says in results}
        assert said == {f"peer_memory: its {n} {reads}" for n in {2, ranks.size}} | (
            {"peer_memory: there is one rank, and nothing to send"} if ranks.size == 2 else set()
        )


def test_memory_is_released_together(ranks: ProcessRanks) -> None:
    for said in ranks.run(programs.release_together):
        assert said == [True] * 8
