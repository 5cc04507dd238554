"""Models as one graph: no graph is made for a batch after the second, and every bit is that of the model uncompiled."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import islice

import pytest
import torch
from programs import graph_cases
from programs.graph_cases import CASES, Place, check_counts, run_case

import cpattn
from cpattn.testing import ProcessRanks, run_loopback


@pytest.fixture(autouse=True)
def _forget_compiled_code() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", CASES)
def test_one_rank(name: str) -> None:
    check_counts(name, run_case(name, Place(1, 0)))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's own backend for CPUs needs a C++ compiler")
def test_torchs_own_backend_takes_any_size_from_the_first_batch_on() -> None:
    assert set(run_case("pages_and_out", Place(1, 0), "inductor", dynamic=True, batches=2)) == {1}


def test_processes_and_each_kind_of_group() -> None:
    with ProcessRanks(3, timeout=300) as ranks:
        for graphs in ranks.run(graph_cases.run_with_each_kind_of_group):
            for name, counts in graphs.items():
                check_counts(name, counts)


def test_ranks_that_are_threads_share_graphs() -> None:
    plain = graph_cases.Model().eval()
    compiled = torch.compile(plain, backend="aot_eager", fullgraph=True, dynamic=True)

    def run(group: cpattn.Transport) -> None:
        for step in islice(CASES["prompts"][1](Place(2, group.rank, group)), 3):
            with torch.inference_mode():
                assert torch.equal(compiled(*step.arguments()), plain(*step.arguments()))

    run_loopback(run, 2)
