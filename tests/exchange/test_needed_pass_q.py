"""pass_q in which few queries see keys of other ranks: those alone travel, over collectives or as a read of peers' memory."""

from __future__ import annotations

from typing import Any

import pytest
from devices.peers_on_host import let_read
from inputs.cases import AttentionCase
from inputs.own_partitions import OwnPartition

import cpattn
from cpattn.exchange.traveling_queries import traveling_queries
from cpattn.metadata import needed_keys
from cpattn.testing import run_loopback

# One request that is cut among all ranks, beside some that are short.
MIXED = [(3, 90), (0, 5), (7, 0), (40, 9), (0, 6), (0, 13), (21, 1), (0, 8)]


@pytest.mark.parametrize("window", [None, 1, 12])
@pytest.mark.parametrize("cache", ["packed", "sharded"])
@pytest.mark.parametrize("options", [{"partition": "whole", "pad_to": 4}, {"partition": OwnPartition(3)}], ids=["mixed", "own"])
@pytest.mark.parametrize(("strategy", "reads"), [("pass_q", False), ("pass_q", True), ("pass_q_ring", False)])
def test_results(strategy: str, reads: bool, cache: str, options: Any, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if cache == "sharded" and window is not None:
        return  # which it refuses
    monkeypatch.setattr(needed_keys, "MOST_NEEDED", 1.0)
    case = AttentionCase(MIXED, cache=cache, window=window, page_size=5, sinks=True)
    plan = case.plan(3, **options)
    travels = traveling_queries(case.problem(plan), plan)
    assert travels.what == ("nothing" if window == 1 else "needed")

    def program(group: cpattn.Transport) -> Any:
        made = let_read(group) if reads else []
        result = case.on_rank(plan, group.rank, group, strategy, backend)
        assert len(made) == (2 if reads and window != 1 else 0)
        # Queries that others have, and results of its own.
        read = [sum(rows.take_read()) for rows in made]
        assert not read or read == [travels.between[:, group.rank].sum(), travels.between[group.rank].sum()]
        return result

    for backend in ("reference", "cpu") if window is None else ("reference",):
        case.check(run_loopback(program, 3, timeout=20), plan, strategy, backend)
