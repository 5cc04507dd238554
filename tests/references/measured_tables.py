"""Tables of benchmarks/results, line by line, with what the cost model says of each."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench_partitions import BATCHES

import cpattn
from cpattn.exchange.traveling_keys import traveling_keys
from cpattn.machine import H100, H200, LinkCosts
from cpattn.metadata.own_keys import rows_put

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
# Of layers that bench_transports.py captures in a graph.
LAYERS = 4
# Of a graph, beside others in random order: from here on a card has no rest that counts.
LONG_RUN_US = 20_000
# In late_keys.md, before its second table.
LATER = "## Keys in order where peers read them"


class Way(NamedTuple):
    """A batch, and how it is served."""

    batch: str
    cp_size: int
    strategy: str
    transport: str
    backend: str
    sharded: bool = False
    page_size: int | None = None
    overlap: int = 1
    partition: str = "zigzag"
    sinks: bool = False


class Line(NamedTuple):
    """A way, the microseconds that were measured, and by which words a table knows it."""

    key: tuple[str, str, str]
    way: Way
    measured: float
    estimated: float


def table(name: str) -> list[dict[str, str]]:
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def number(text: str) -> float:
    return float(text.replace(",", ""))


def tokens(text: str) -> int:
    return int(number(text.removesuffix("k")) * (1024 if text.endswith("k") else 1))


@cache
def batch_of(text: str) -> tuple[tuple[int, int], ...]:
    """
    >>> batch_of("2 x (8k + 1), 30k + 1,920")
    ((8192, 1), (8192, 1), (30720, 1920))
    """
    if "ragged" in text:
        return tuple(BATCHES[text])
    requests: list[tuple[int, int]] = []
    for part in re.sub(r"(\d),(\d{3})", r"\1\2", text).split(", "):
        found = re.fullmatch(r"(?:(\d+) x )?\(?(?:(\w+) \+ )?(\w+)\)?", part)
        assert found, text
        requests += [(tokens(found[2] or "0"), tokens(found[3]))] * int(found[1] or 1)
    return tuple(requests)


@cache
def estimates_of(
    batch: str, cp_size: int, sharded: bool, page_size: int | None, partition: str, sinks: bool, machine: cpattn.Machine
) -> dict[tuple[str, str, str, int], cpattn.Estimate]:
    requests = batch_of(batch)
    shards = [[prefix // cp_size + (rank < prefix % cp_size) for rank in range(cp_size)] for prefix, _ in requests]
    plan = cpattn.plan(requests, cp_size, partition=partition, prefix_shards=shards if sharded else None)
    found = cpattn.estimate(plan, replace(problem_of(plan, page_size), sinks=sinks), machine)
    return {(one.strategy, one.transport, one.backend, one.overlap): one for one in found}


def problem_of(plan: cpattn.Plan, page_size: int | None) -> cpattn.Problem:
    cache: Any = "paged" if page_size else "packed" if plan.num_prefix_tokens else None
    return cpattn.Problem(
        torch.device("cuda"), torch.bfloat16, plan.rows, 32, 8, head_dim=128, v_head_dim=128, cache=cache, page_size=page_size
    )


def estimate(way: Way, machine: cpattn.Machine) -> cpattn.Estimate:
    transport = way.transport
    if transport == "no transfer":
        machine, transport = with_local_copies(machine), "collectives"
    found = estimates_of(way.batch, way.cp_size, way.sharded, way.page_size, way.partition, way.sinks, machine)
    return found[way.strategy, transport, way.backend, way.overlap]


def graph_us(way: Way, machine: cpattn.Machine) -> float:
    return estimate(way, machine).graph * 1e6


def before_late_keys(machine: cpattn.Machine) -> cpattn.Machine:
    """As the library was when some tables were measured: all keys were in order, and prefixes copied, before any attention began."""
    return replace(machine, kernels=tuple(replace(one, waits_for_keys=False, reads_in_place=False) for one in machine.kernels))


def before_short_messages(machine: cpattn.Machine) -> cpattn.Machine:
    """As the library was then: short messages came by few programs, each on a multiprocessor of its own, which the attention waited for."""
    assert machine.peer_memory is not None
    return replace(machine, peer_memory=replace(machine.peer_memory, late_latency=22e-6))


def with_local_copies(machine: cpattn.Machine) -> cpattn.Machine:
    """What others would send is a copy within the GPU."""
    link = LinkCosts(machine.launch, machine.copy / 2, machine.copy / 2, 0.0, 0.0, by_kernels=True, host_gather=15e-6, host_shift=15e-6)
    return replace(machine, collectives=link, across=link, peer_memory=None)


def transports_ways() -> Iterator[tuple[Way, dict[str, str]]]:
    for row in table("transports_2_gpus"):
        batch, _, strategy = row["batch"].partition(", ")
        strategy = strategy or "all_gather"
        sharded = strategy == "pass_q"
        yield Way(batch, 2, strategy, row["transport"], row["backend"], sharded, 64 if sharded else None), row


def layers_us(way: Way, machine: cpattn.Machine) -> float:
    """Of one of the layers of a graph, after a short rest, of which a card has some ms at its highest clock."""
    rested, sustained = (LAYERS * graph_us(way, kind) for kind in (machine.rested(), machine))
    part = min(1.0, machine.boost_seconds * 1e6 / rested)
    return (part * rested + (1 - part) * sustained) / LAYERS


def transports_lines() -> Iterator[Line]:
    for way, row in transports_ways():
        key = "transports_2_gpus", row["batch"], row["backend"]
        yield Line(key, way, number(row["graph, p50, us"]), layers_us(way, before_late_keys(H200)))


def layer_lines() -> Iterator[Line]:
    for row in table("layer_gpu"):
        way = Way(
            f"{row['prefix'].replace(',', '')} + {row['new tokens'].replace(',', '')}",
            int(row["cp"]),
            row["strategy"],
            "no transfer",
            row["backend"],
        )
        measured = number(row["layer as a graph, us"])
        yield Line(("layer_gpu", way.batch, row["backend"]), way, measured, graph_us(way, H200.rested()))


def serving_lines() -> Iterator[Line]:
    """But for a ring in which all shards went around where now those alone travel that are needed."""
    for row in table("serving_gpu"):
        if (row["batch"].partition(":")[0], row["cache"], row["strategy"]) == ("mixed", "sharded", "ring"):
            continue
        batch, sharded = row["batch"].partition(": ")[2], row["cache"] == "sharded"
        alone = row["strategy"] == "one rank"
        way = Way(batch, 1 if alone else 4, "all_gather" if alone else row["strategy"], "no transfer", "triton", sharded, 64)
        key = "serving_gpu", row["batch"], f"{row['cache']} {row['strategy']}"
        yield Line(key, way, number(row["p50, ms"]) * 1e3, graph_us(way, H200.rested()))


def backends_lines(name: str) -> Iterator[Line]:
    """But for windows, launches alone, and ragged contexts, whose lengths the table does not have."""
    for row in table(name):
        if re.search(r"window|0\.2k", row["batch"]) or "launch" in row["backend"]:
            continue
        batch, *words = re.split(r", (?=pages|ring|pass_q|sinks)", row["batch"])
        page_size = next((int(word.split()[-1]) for word in words if word.startswith("pages")), None)
        strategy, _, cp_size = next((word for word in words if word.startswith(("ring", "pass_q"))), "all_gather of 1").partition(" of ")
        sharded = strategy == "pass_q"
        way = Way(batch, int(cp_size), strategy, "no transfer", row["backend"], sharded, page_size, sinks="sinks" in words)
        yield Line((name, row["batch"], row["backend"]), way, number(row["graph p50, us"]), graph_us(way, before_late_keys(H100.rested())))


def nccl_lines() -> Iterator[Line]:
    text = (RESULTS / "nccl_two_h100.md").read_text().partition("The same as CUDA graphs")[2].partition("Decoding")[0]
    batches, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|"))
    for variant, *cells in rows:
        strategy, _, overlap = variant.partition(", overlap ")
        for batch, cell in zip(batches[1:], cells, strict=True):
            transport = "no transfer" if strategy == "no transfer" else "collectives"
            way = Way(batch, 2, "ring" if strategy == "ring" else "all_gather", transport, "flash_attn4", overlap=int(overlap or 1))
            yield Line(("nccl_two_h100", batch, variant), way, number(cell) * 1e3, graph_us(way, H100.rested()))


# Of each table beside peers how many GPUs, and what it was measured on.
PEERS_TABLES = {
    "peers_2_gpus": (2, H200),
    "peers_4_gpus": (4, before_late_keys(H100)),
}


def peers_ways(name: str) -> Iterator[tuple[Way, dict[str, str]]]:
    """cpattn's own fixed choices, beside peers."""
    cp_size, _ = PEERS_TABLES[name]
    for row in table(name):
        strategy, transport, backend = row["variant"].removeprefix("cpattn ").split(", ") if row["kind"] == "fixed" else ("", "", "")
        if strategy:
            yield Way(row["batch"], cp_size, strategy, transport, backend), row


def peers_lines(name: str) -> Iterator[Line]:
    _, machine = PEERS_TABLES[name]
    for way, row in peers_ways(name):
        measured = number(row["graph, p50, us"])
        key = name, way.batch, f"{way.strategy}, {way.transport}, {way.backend}"
        yield Line(key, way, measured, graph_us(way, machine.rested() if measured < LONG_RUN_US else machine))


def scaling_ways() -> Iterator[tuple[Way, dict[str, str]]]:
    """Those that were timed, but for choices of "auto" and another partition."""
    for row in table("scaling_4_gpus_all"):
        fixed = row["transport"] in ("peer_memory", "collectives") and row["partition"] == "zigzag"
        if fixed and row["graph, p50, us"]:
            backend = row["backend"] if row["backend"] != "auto" else row["chosen"].split(", ")[1]
            yield Way(row["batch"], int(row["GPUs"]), row["strategy"], row["transport"], backend), row


def scaling_lines() -> Iterator[Line]:
    for way, row in scaling_ways():
        key = "scaling_4_gpus_all", f"{way.batch} over {way.cp_size}", f"{way.strategy}, {way.transport}, {way.backend}"
        yield Line(key, way, number(row["graph, p50, us"]), graph_us(way, H100.rested()))


def late_keys_ways() -> Iterator[tuple[Way, bool, float]]:
    """A way, whether its keys may come late, and what was measured."""
    text = (RESULTS / "late_keys.md").read_text().partition(LATER)[0]
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|"))
    names = "collectives, triton", "peers, flash_attn4", "peers, triton, keys first", "peers, triton, keys beside"
    for cells in rows:
        row = dict(zip(header, cells, strict=True))
        for name in names:
            transport, backend = name.replace("peers", "peer_memory").split(", ")[:2]
            yield Way(row["batch"], int(row["GPUs"]), "all_gather", transport, backend), "first" not in name, number(row[name])


def keys_in_place_lines() -> Iterator[Line]:
    """The latest of keys that come late, whose own ones are written once."""
    for line in (RESULTS / "late_keys.md").read_text().partition(LATER)[2].splitlines():
        found = re.match(r"\| (\d[^|]*?)(?:, one|, eight)? \|[^|]*\| ([\d,.]+) \(", line)
        if found:
            batch = {"64 ragged": "64 ragged ~0.9k", "120k + 2k": "1 x (120k + 2k)"}.get(found[1], found[1])
            way = Way(batch, 2, "all_gather", "peer_memory", "triton")
            yield Line(("late_keys, in place", batch, "triton"), way, number(found[2]), layers_us(way, before_short_messages(H100)))


def late_keys_lines() -> Iterator[Line]:
    for way, may, measured in late_keys_ways():
        # Keys first, but prefixes were read where they lie.
        machine = before_short_messages(H100)
        if not may:
            machine = replace(machine, kernels=tuple(replace(one, waits_for_keys=False) for one in machine.kernels))
        words = f"{way.transport}, {way.backend}, keys {'beside' if may else 'first'}"
        yield Line(("late_keys", f"{way.batch} over {way.cp_size}", words), way, measured, layers_us(way, machine))


def partitions_lines() -> Iterator[Line]:
    """Where "auto" took an all-gather with triton, as it did for batches of fewer than 1,024 new tokens a request."""
    for row in table("partitions_2_gpus"):
        found = re.fullmatch(r"cpattn (zigzag|whole)(, collectives)?", row["variant"])
        if found and row["batch"] != "32 x 2k":
            way = Way(row["batch"], 2, "all_gather", "collectives" if found[2] else "peer_memory", "triton", partition=found[1])
            estimated = graph_us(way, before_short_messages(H100.rested())) + all_rows_us(way, H100)
            yield Line(("partitions_2_gpus", way.batch, row["variant"]), way, number(row["graph, p50, us"]), estimated)


def all_rows_us(way: Way, machine: cpattn.Machine) -> float:
    """What calls took more when that table was measured: where anything travelled, a rank put all of its rows in order, and over
    collectives it packed them first; now those of cut requests alone."""
    plan = cpattn.plan(batch_of(way.batch), way.cp_size, partition=way.partition)
    if traveling_keys(problem_of(plan, None), plan).what == "nothing":
        return 0.0
    rows = int((plan.rank_tokens - rows_put(plan)).min())
    return (1 + (way.transport == "collectives")) * 2 * rows * problem_of(plan, None).key_bytes / machine.copy * 1e6


_TABLES: dict[str, Callable[[], Iterator[Line]]] = {
    "transports_2_gpus": transports_lines,
    "layer_gpu": layer_lines,
    "serving_gpu": serving_lines,
    "nccl_two_h100": nccl_lines,
    **{name: partial(peers_lines, name) for name in PEERS_TABLES},
    "scaling_4_gpus_all": scaling_lines,
    "late_keys": late_keys_lines,
    "late_keys, in place": keys_in_place_lines,
    "partitions_2_gpus": partitions_lines,
}
_BACKENDS: dict[str, Callable[[], Iterator[Line]]] = {
    name: partial(backends_lines, name) for name in ("backends_gpu_fa3", "backends_gpu_fa4", "backends_gpu_merging")
}
TABLES = _TABLES | _BACKENDS
