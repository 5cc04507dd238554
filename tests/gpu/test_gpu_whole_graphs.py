"""Models as one graph on GPUs: over NCCL, within a CUDA graph of a bucket, and beside CUDA graphs that torch captures itself."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from programs import graph_cases
from programs.graph_cases import CASES, Place, check_counts, run_case

from cpattn.testing import ProcessRanks

ALONE = Place(1, 0, device="cuda:0")


@pytest.fixture(scope="module")
def ranks() -> Iterator[ProcessRanks]:
    with ProcessRanks(2, timeout=400, transport="nccl") as ranks:
        yield ranks


@pytest.mark.parametrize("name", CASES)
def test_one_gpu(name: str) -> None:
    check_counts(name, run_case(name, ALONE, "inductor"))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_two_gpus(ranks: ProcessRanks, backend: str) -> None:
    for graphs in ranks.run(graph_cases.run_cases, backend, list(CASES)):
        for name, counts in graphs.items():
            check_counts(name, counts)


def test_a_cuda_graph_of_a_compiled_model_replays_any_batch() -> None:
    graph_cases.run_captured(ALONE)


def test_a_cuda_graph_of_a_compiled_model_over_two_gpus(ranks: ProcessRanks) -> None:
    ranks.run(graph_cases.run_captured)


def test_calls_stay_outside_of_graphs_that_torch_captures() -> None:
    assert graph_cases.run_between_captured_pieces(ALONE) > 0


def test_calls_over_pages_beside_graphs_that_torch_captures() -> None:
    """Whether torch captures anything beside inputs that are written is its own affair."""
    graph_cases.run_between_captured_pieces(ALONE, over_pages=True)


def test_calls_stay_outside_of_captured_graphs_over_two_gpus(ranks: ProcessRanks) -> None:
    assert all(recorded > 0 for recorded in ranks.run(graph_cases.run_between_captured_pieces))
