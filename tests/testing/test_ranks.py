"""Running N ranks: modes that threads inherit, and ranks that are stuck."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import pytest
import torch
from programs import rank_programs as programs

import cpattn
from cpattn.testing import ProcessRanks, SoloCommunicator, check_backend, oracle_attention, run_loopback


def test_threads_have_the_callers_modes() -> None:
    def modes(communicator: cpattn.Communicator) -> tuple[bool, bool, bool, torch.dtype]:
        enabled = torch.is_autocast_enabled("cpu")
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), enabled, torch.get_autocast_dtype("cpu")

    assert run_loopback(modes, 2) == [(True, False, False, torch.bfloat16)] * 2
    with torch.no_grad():
        assert run_loopback(modes, 2) == [(False, False, False, torch.bfloat16)] * 2
    with torch.inference_mode():
        assert run_loopback(modes, 2) == [(False, True, False, torch.bfloat16)] * 2
    with torch.autocast("cpu", dtype=torch.float16):
        assert run_loopback(modes, 2) == [(True, False, True, torch.float16)] * 2


@pytest.mark.parametrize("rank_0_fails", [False, True])
def test_a_stuck_thread_keeps_nobody_for_longer_than_the_timeout(rank_0_fails: bool) -> None:
    over: list[bool] = []

    def program(communicator: cpattn.Communicator) -> None:
        while communicator.rank == 1 and not over:
            time.sleep(0.01)
        if rank_0_fails and communicator.rank == 0:
            raise KeyError("rank 0 has failed")

    begin = time.monotonic()
    error, message = (KeyError, "rank 0 has failed") if rank_0_fails else (TimeoutError, "rank 1 had not returned")
    with pytest.raises(error, match=message):
        run_loopback(program, 3, timeout=0.5)
    assert time.monotonic() - begin < 10
    over.append(True)


def test_a_stopped_process_is_killed_after_the_timeout() -> None:
    with ProcessRanks(2, timeout=3) as ranks:
        assert ranks.run(programs.rank_of_this_process) == [0, 1]
        outcomes = ranks.outcomes(programs.stop, 1)
        assert outcomes[0] == (True, "returned")
        assert outcomes[1] == (False, "the rank had not returned 6 s after the first one did; its process was killed")
        # It is not there for the next run.
        assert ranks.outcomes(programs.rank_of_this_process)[1] == (False, "the process died with exit code -9")


X = torch.zeros(3, 1, 8)
MISTAKES: dict[str, tuple[Callable[[], object], type[cpattn.CPError], str]] = {
    "no process": (lambda: ProcessRanks(0), cpattn.GroupError, "size=0; pass the number of processes, an integer of at least 1"),
    "no transport": (
        lambda: ProcessRanks(2, transport="mpi"),
        cpattn.UnknownNameError,
        "transport='mpi' is unknown; choose one of 'gloo', 'nccl'",
    ),
    "no such rank": (lambda: SoloCommunicator(3, 3), cpattn.GroupError, "rank 3 of 3; pass one of 0 to size - 1"),
    "no device": (lambda: check_backend("reference", "cuda:99"), cpattn.CPError, "device='cuda:99' cannot be used on this machine"),
    "few queries": (lambda: oracle_attention(X[:2], X, X, [(0, 3)]), cpattn.RowCountError, "q has 2 rows, but the batch has 3 new tokens"),
    "few keys": (
        lambda: oracle_attention(X, X[:2], X, [(0, 2), (0, 1)]),
        cpattn.RowCountError,
        "k has 2 rows, but the batch has 3 new tokens",
    ),
    "no prefix": (
        lambda: oracle_attention(X, X, X, [(4, 3)]),
        cpattn.RowCountError,
        "prefix_k has 0 rows, but the batch has 4 prefix tokens",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_refused_before_anything_is_started(mistake: str) -> None:
    make, error, message = MISTAKES[mistake]
    with pytest.raises(error, match=re.escape(message)):
        make()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_nccl_without_a_gpu_is_refused() -> None:
    with pytest.raises(cpattn.GroupError, match="transport='nccl' is for GPUs, and torch finds none here; pass 'gloo'"):
        ProcessRanks(2, transport="nccl")
