"""A rank that is killed or stopped while others read its memory: they end in time, and are told. No GPU hangs."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from programs import fault_programs as programs

from cpattn.testing import ProcessRanks

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="each rank needs a GPU of its own")
LIMIT = 2.0
MISSED = f"GroupError: this group cannot be used any more: rank 1 did not post or read a message within {LIMIT:g} s"


@pytest.mark.parametrize(
    ("strategy", "fault", "when"),
    [
        ("all_gather", "killed", "before"),
        ("ring", "killed", "during"),
        ("all_gather", "comes back", "before"),
        ("ring", "comes back", "after"),
    ],
)
def test_a_rank_that_is_gone_is_found_out_once_and_for_all(strategy: str, fault: str, when: str) -> None:
    """One call of the others ends in NaN after the limit, and each later one raises at once. Who comes back is told as well, and has no
    wrong result."""
    go_on = partial(programs.go_on, calls=4, kind="peer_memory", limit=LIMIT)
    with ProcessRanks(min(3, torch.cuda.device_count()), timeout=30, transport="nccl", patience=30) as ranks:
        outcomes = ranks.outcomes(go_on, strategy, 1, fault, when, "cuda")
    comes_back, seen = outcomes[1]
    assert comes_back == (fault == "comes back"), seen
    for rank, (done, calls) in enumerate(outcomes):
        if rank == 1 and not comes_back:
            continue
        assert done, calls
        # In this order: what needed nothing of that rank any more, the call in which it was missed, and all later ones.
        kinds = [next(n for n, kind in enumerate(("the right result", "NaN", MISSED)) if call.what.startswith(kind)) for call in calls]
        assert kinds == sorted(kinds), calls
        assert kinds.count(1) <= 1
        assert kinds[-1] == 2
        if rank != 1:
            assert all(call.seconds < 10 * LIMIT for call in calls)
            assert all(call.seconds < 1 for call, kind in zip(calls, kinds, strict=True) if kind == 2)
