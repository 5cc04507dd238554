"""Running N ranks: modes that threads inherit, and ranks that are stuck."""

from __future__ import annotations

import time

import pytest
import torch
from programs import rank_programs as programs

import cpattn
from cpattn.testing import ProcessRanks, run_loopback


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
