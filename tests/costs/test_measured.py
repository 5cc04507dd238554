"""The estimates beside what was measured: every line of the tables in benchmarks/results that the model covers.

Of 300 us and more, an estimate of a CUDA graph is within 10%. Shorter ones are within some us. Lines
that are further off stand in ``FURTHER_OFF``, with the reason.
"""

from __future__ import annotations

import re

import pytest
from references.measured_tables import (
    RESULTS,
    TABLES,
    Line,
    Way,
    batch_of,
    before_late_keys,
    estimate,
    number,
    problem_of,
    table,
    transports_ways,
    with_local_copies,
)

import cpattn
from cpattn.costs.bounds import Bounds
from cpattn.costs.launches import Launches
from cpattn.machine import H100, H200

# From here on estimates are held to 10%.
LONG_US = 300
# Below, so many us. A ring of FlashAttention kernels over few tokens, and decoding a few long contexts with them, have launches of a
# few us, which overlap more than the model has it.
SHORT_US = 32
SHORT_FLASH_US = 80
# Estimate over measured, at the least and at the most, where it is not within 10%.
FURTHER_OFF = {
    # Tiles that are a quarter full, for which this kernel chooses badly.
    ("backends_gpu_fa4", "64 x 512", "flash_attn4"): (0.75, 0.9),
    # 11% too high: of one long row, which it does not split, a tile is faster than among others.
    ("backends_gpu_fa4", "1 x (128k + 1), pages of 64", "flash_attn4"): (1.0, 1.2),
    ("backends_gpu_merging", "64 x 512, sinks", "flash_attn4"): (0.85, 0.95),
    # 17% too high: the pass that puts sinks on results is faster there.
    ("backends_gpu_merging", "64 x 512, sinks", "flash_attn3"): (1.1, 1.2),
    # 10 to 12% too low.
    ("backends_gpu_merging", "64 x 512, ring of 4", "flash_attn3"): (0.85, 0.95),
    ("backends_gpu_merging", "8 x (8k + 1k), pages of 64, pass_q of 4", "flash_attn4"): (0.85, 0.95),
    ("backends_gpu_merging", "8 x (8k + 1k), pages of 64, pass_q of 4", "flash_attn3"): (0.85, 0.95),
    # 14% too high: of many short requests more of the transfer is hidden than of a few long ones, and the kernel is 1.5% faster since.
    ("peers_2_gpus", "64 ragged ~0.9k", "all_gather, peer_memory, triton"): (1.1, 1.2),
    # 12% too low: results of half precision go through memory between hops.
    ("peers_4_gpus", "64 ragged ~0.9k", "ring, collectives, flash_attn4"): (0.85, 0.95),
    # 15% too high: among four GPUs peers' rows of a short prompt come faster than crowding has it.
    ("scaling_4_gpus_all", "1 x 8k over 4", "all_gather, peer_memory, flash_attn3"): (1.1, 1.2),
    # 12% too low: results of half precision go through memory between hops.
    ("scaling_4_gpus_all", "1 x 8k over 4", "ring, collectives, flash_attn3"): (0.85, 0.95),
    # 11 to 18% too low: queries and partial results of a prompt, which auto sends for none.
    ("scaling_4_gpus_all", "1 x 8k over 2", "pass_q, peer_memory, flash_attn3"): (0.8, 0.95),
    ("scaling_4_gpus_all", "1 x 8k over 2", "pass_q, collectives, flash_attn3"): (0.85, 0.95),
    ("scaling_4_gpus_all", "1 x 32k over 2", "pass_q, peer_memory, flash_attn3"): (0.85, 0.95),
}


@pytest.mark.parametrize("name", TABLES)
def test_estimates_of_graphs_are_near_what_was_measured(name: str) -> None:
    lines = list(TABLES[name]())
    assert len(lines) >= (7 if "in place" in name else 12)
    wrong = [f"{line.key} {line.way.strategy}: {line.measured:.1f} measured, {line.estimated:.1f}" for line in lines if not is_near(line)]
    assert not wrong, "\n".join(wrong)


def test_the_docs_say_how_near() -> None:
    off = sorted(abs(line.estimated / line.measured - 1) for lines in TABLES.values() for line in lines() if line.measured >= LONG_US)
    near = sum(one <= 0.1 for one in off)
    assert off[len(off) // 2] <= 0.025
    docs, changes = (" ".join((RESULTS.parents[1] / name).read_text().split()) for name in ("docs/choosing.md", "CHANGELOG.md"))
    assert f"Of {len(off)} graphs of {LONG_US} us and more {near} are within 10%, and half within 2.5%. " in docs
    assert f"The other {len(off) - near} are up to {off[-1]:.0%} off, and stand in the test" in docs
    assert f"Shorter graphs are within {SHORT_US} us, or {SHORT_FLASH_US} us in a ring" in docs
    assert f"{LONG_US} us and more, it is within 10% of {near} of {len(off)}." in changes


def is_near(line: Line) -> bool:
    ratio, difference = line.estimated / line.measured, abs(line.estimated - line.measured)
    if line.key in FURTHER_OFF:
        low, high = FURTHER_OFF[line.key]
        return low <= ratio <= high
    if line.measured >= LONG_US:
        return 0.9 <= ratio <= 1.1
    short_flash = line.way.strategy != "all_gather" and line.way.backend != "triton"
    return difference <= (SHORT_FLASH_US if short_flash else SHORT_US)


def test_launches_alone_after_a_rest_and_without() -> None:
    for row in table("attention_gpu"):
        batch, _, cp_size = row["batch"].partition(", cp ")
        backend = row["backend"].split()[0].rstrip(",")
        if "one launch" not in row["backend"] or "ragged" in batch or backend == "torch_flash":
            continue
        plan = cpattn.plan(batch_of(batch), int(cp_size))
        rank, problem = plan.cp_size // 2, problem_of(plan, None)
        flops = 4 * 32 * 128 * plan.rank_pairs[rank]
        sustained = {H100: flops / number(row["sustained TFLOP/s"]) * 1e-12} if plan.num_tokens > len(plan.batch) else {}
        for machine, measured in ({H100.rested(): number(row["p50, ms"]) * 1e-3} | sustained).items():
            kernel = next(kernel for kernel in machine.kernels if kernel.backend == backend)
            (hop,) = cpattn.STRATEGIES["all_gather"].schedule(problem, plan)
            estimated = float(Launches(plan, problem, machine).seconds(hop, kernel)[rank])
            near = 0.1 if measured * 1e6 >= LONG_US else 0.15
            assert abs(estimated / measured - 1) <= near, (row, estimated)


def test_requests_left_whole() -> None:
    """The table of partitions in docs/choosing.md, of which no constant comes: one launch with every request cut, with the copies around
    it, and with every request whole, without them."""
    section = (RESULTS.parents[1] / "docs" / "choosing.md").read_text().partition("## Partitions")[2].partition("Between two H100")[0]
    lines = [line for line in section.splitlines() if re.match(r"\| \d+ x \d+k? \|", line)]
    assert len(lines) == 2
    for line in lines:
        batch, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        for cp_size, cell in zip((2, 4, 8), cells, strict=True):
            for partition, measured in zip(("zigzag", "whole"), map(number, cell.split(", ")), strict=True):
                plan = cpattn.plan(batch_of(batch), cp_size, partition=partition)
                machine = with_local_copies(H100.rested())
                found = cpattn.estimate(plan, problem_of(plan, None), machine)
                one = next(one for one in found if (one.strategy, one.backend, one.overlap) == ("all_gather", "triton", 1))
                estimated = (one.graph if partition == "zigzag" else one.compute) * 1e6
                assert abs(estimated - measured) <= max(0.1 * measured, 8), (batch, cp_size, partition, estimated)


def test_what_bounds_requests_left_whole() -> None:
    """The table below it, of what is left to gain: parts of what was measured, and estimates."""
    page = (RESULTS.parents[1] / "docs" / "choosing.md").read_text().partition("| batch, of two GPUs |")[2].partition("\n\n")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines()[2:]]
    assert len(lines) == 4
    timed = [row for row in table("partitions_2_gpus") if row["graph, p50, us"]]
    machine, measured = H100.rested(), {(row["batch"], row["variant"]): number(row["graph, p50, us"]) for row in timed}
    (kernel,) = machine.only("triton").kernels
    for batch, *cells in lines:
        zigzag, auto = (measured[batch, f"cpattn {name}"] for name in ("zigzag", "auto"))
        alone = min(measured[batch, f"one GPU, {name}"] for name in ("triton", "flash_attn4"))
        assert cells[:2] == [f"{alone / 2 / zigzag:.2f}", f"{auto / zigzag:.2f}"]
        plans = [cpattn.plan(batch_of(batch), 2, partition=name) for name in ("whole", "uncut")]
        whole, uncut = (estimate(Way(batch, 2, "all_gather", "peer_memory", "triton", partition=plan.kind), machine) for plan in plans)
        problem = problem_of(plans[0], None)
        full = Bounds(Launches(plans[0], problem, machine, [kernel]), {kernel.backend: False}).at_least(kernel.backend)
        assert cells[2:] == [f"{us * 1e6:,.0f}" for us in (full, whole.compute, whole.moves, whole.exposed, uncut.graph)]
        assert cpattn.plan(batch_of(batch), 2, partition="auto").partition == "whole"
    assert cpattn.plan(batch_of(lines[0][0]), 2, partition="auto", token_cost=1000).partition == "uncut"


def test_no_line_is_excused_that_is_not_there() -> None:
    assert {line.key for lines in TABLES.values() for line in lines()} >= set(FURTHER_OFF)


def test_eager_calls_and_the_hosts_time() -> None:
    """The host's time depends on what else its processes do: the same call took 124 and 156 us in two runs."""
    for way, row in transports_ways():
        one = estimate(way, before_late_keys(H200))
        assert 0.5 <= one.host * 1e6 / number(row["host, us"]) <= 2, (way, one)
        if number(row["graph, p50, us"]) >= LONG_US:
            assert 0.75 <= one.eager * 1e6 / number(row["eager, p50, us"]) <= 1.25, (way, one)


BATCHES = ("1 x 128k", "1 x 32k", "8 x 8k", "8 x (8k + 2k)", "1 x 8k", "1 x 2k", "1 x (8k + 1k)", "1 x (120k + 2k)")


def whole_is_fastest(batch: str, cp_size: int, transport: str, machine: cpattn.Machine) -> bool:
    """Whether an all-gather of all heads at once is estimated to be faster than any in groups, as a graph and eagerly."""
    way = Way(batch, cp_size, "all_gather", transport, "flash_attn4")
    whole, *parts = (estimate(way._replace(overlap=overlap), machine) for overlap in (1, 2, 4, 8))
    return all(whole.graph < part.graph and whole.eager < part.eager for part in parts)


def test_an_all_gather_in_groups_is_never_estimated_to_pay_where_it_did_not() -> None:
    """In nccl_two_h100.md every split made every batch slower, as a graph and eagerly, from 1k tokens to 128k."""
    for machine in (H100, H100.rested()):
        assert all(whole_is_fastest(batch, 2, "collectives", machine) for batch in BATCHES)


@pytest.mark.parametrize("cp_size", [2, 8])
def test_an_all_gather_in_groups_never_pays_over_the_memory_of_peers(cp_size: int) -> None:
    """The kernel that pulls a group stands in the stream of the attention to the one before it, so that nothing is hidden."""
    assert all(whole_is_fastest(batch, cp_size, "peer_memory", H100) for batch in BATCHES)


def test_what_kernels_pull_over_the_memory_of_peers_is_exposed() -> None:
    """All gathers, those of queries too; what copy engines bring is hidden as far as attention goes."""
    for strategy, overlap in (("all_gather", 4), ("pass_q", 1)):
        one = estimate(Way("8 x (8k + 2k)", 8, strategy, "peer_memory", "triton", overlap=overlap), H100)
        assert one.exposed == pytest.approx(one.transfer)
    ring = estimate(Way("1 x 128k", 8, "ring", "peer_memory", "triton"), H100)
    assert H100.peer_memory is not None
    link = H100.peer_memory
    assert ring.exposed == pytest.approx(7 * link.latency_of_shift + (1 - link.hides_shift) * (ring.transfer - 7 * link.latency_of_shift))
