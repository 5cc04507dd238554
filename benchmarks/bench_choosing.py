"""How long "auto" takes to choose, on a CPU, as for H100 on which all of their backends are installed.

python benchmarks/bench_choosing.py
"""

from __future__ import annotations

import random
import time
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from timing import percentiles, write_report

import cpattn
from cpattn.attention import auto
from cpattn.attention.registry import BACKENDS
from cpattn.costs import known_machine
from cpattn.costs.decide import Setting
from cpattn.exchange.auto import candidate_strategies

ROUNDS = 51


def _ragged(many: int, with_prefix: bool) -> list[tuple[int, int]]:
    rng = random.Random(0)
    return [(int(rng.lognormvariate(8, 0.8)) * with_prefix, max(16, int(rng.lognormvariate(6.4, 0.8)))) for _ in range(many)]


BATCHES = {
    "1 x 8k": [(0, 8192)],
    "8 x (8k + 2k)": [(8192, 2048)] * 8,
    "64 ragged": _ragged(64, False),
    "256 x (8k + 1)": [(8192, 1)] * 256,
    "256 ragged, prefixes": _ragged(256, True),
}


def main() -> None:
    able: dict[str, Any] = {"unavailable": lambda: None, "refuses": lambda problem: None, "how": lambda problem: None}
    for name, backend in BACKENDS.items():
        BACKENDS[name] = replace(backend, **able)
    with patch.object(auto, "capability", lambda device: (9, 0)), patch.object(known_machine, "capability", lambda device: (9, 0)):
        rows = [row(name, cp_size, fixed) for name in BATCHES for cp_size in (2, 8) for fixed in (False, True)]
    write_report(
        "choosing_cpu",
        "Choosing strategy and backend",
        ["batch", "cp_size", "calls", "new plan, us", "least", "same plan again, us", "least", "taken"],
        rows,
        "Once for each kind of call and batch, as for H100 that read each other's memory and have all backends; 32 query and 8 key/value "
        f"heads, D = 128. The machine was shared, so that the least of {ROUNDS} is given too. Of a new plan the chunks of each rank and "
        "the keys that it sees are counted as well, which the call needs in any case.",
    )


def row(name: str, cp_size: int, fixed: bool) -> list[str]:
    """Of the table."""
    times: tuple[list[float], list[float]] = [], []
    taken = ""
    for _ in range(ROUNDS):
        plan = cpattn.plan(BATCHES[name], cp_size)
        cache: Any = "packed" if plan.num_prefix_tokens else None
        problem = cpattn.Problem(torch.device("cuda"), torch.bfloat16, plan.rows, 32, 8, 128, 128, cache=cache, fixed=fixed)
        setting = Setting(plan, problem, cpattn.MACHINES["h100-nvlink"], "peer_memory")
        for of in times:
            begin = time.perf_counter()
            way = setting.decide(candidate_strategies("auto", problem, plan), "auto").way
            of.append(time.perf_counter() - begin)
        taken = f"{way.strategy.name}, {way.backend.name}"
    figures = [figure for of in times for figure in (percentiles(np.array(of)), f"{min(of) * 1e6:,.0f}")]
    return [name, str(cp_size), "of a bucket" if fixed else "eager", *figures, taken]


if __name__ == "__main__":
    main()
