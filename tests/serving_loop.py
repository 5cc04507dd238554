"""Random steps of serving loops over every kind of cache: each step's result is the float64 oracle's, and every page is compared after it.

python tests/serving_loop.py --steps 10000
python tests/serving_loop.py --steps 500 --processes

A loop is one engine that admits requests, computes chunks of their prompts, decodes, lets drafts be computed, accepts some of these,
forks and releases. At times a rank raises in the middle of a step, which is taken back. All of it follows from the seed and the loop's
number: ``--seed S --only N`` runs a loop again. Its ranks are threads, or processes over gloo, and each does everything that every rank
of an engine does.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from typing import Any

import numpy as np
import torch
from engines.serving_rank import LONGEST, Loop, Server
from references.cache_model import CacheForm

import cpattn
from cpattn.testing import ProcessRanks, run_loopback

STEPS, PROCESSES = 40, 3
E4M3, E5M2, BF16 = torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16


def draw(seed: int, number: int, cp_size: int | None = None, device: str = "cpu") -> Loop:
    """A loop, alike for the same numbers."""
    rng = np.random.default_rng([seed, number])
    # Each owner and dtype in turn, so that few loops have them all.
    owner: Any = ["striped", "computed", "replicated"][number % 3]
    is_fp8, pool = bool(number // 3 % 2), bool(rng.random() < 0.5)
    if owner == "striped":
        owner = cpattn.Striped(int(rng.choice([1, 1, 2, 3, 7, 16])))
    # On a GPU of what kernels are made for.
    head_dim = 16 if device == "cpu" else 64
    v_in_k, page_size = bool(rng.random() < 0.2), int(rng.choice([1, 3, 4, 5, 16]))
    drawn_size = int(rng.choice([1, 2, 3, 4]))
    form = CacheForm(
        cp_size=drawn_size if cp_size is None else cp_size,
        owner=owner,
        # From what three of the longest requests take on one rank, to plenty.
        num_pages=-(-LONGEST * int(rng.choice([3, 10])) // page_size),
        page_size=page_size,
        kv_heads=int(rng.choice([1, 2, 4])),
        head_dim=head_dim,
        v_head_dim=int(rng.choice([head_dim // 2, head_dim])),
        v_in_k=v_in_k,
        stored=[E4M3, E5M2][rng.integers(2)] if is_fp8 else BF16,
        scales=str(rng.choice(["token", "head"])) if is_fp8 else None,
        device=device,
    )
    known = pool or bool(rng.random() < 0.7)
    queries = "all" if form.sharded and rng.random() < 0.3 else "rows"
    return Loop(seed, number, form, pool, known, queries, bool(rng.random() < 0.3))


def serve(loop: Loop, steps: int) -> Counter[str]:
    """What each process of a group runs."""
    return Server(loop, cpattn.transport()).run(steps)


def serve_on_loopback(loop: Loop, steps: int = STEPS) -> Counter[str]:
    """All ranks as threads; what was done, by kind of step."""
    # On a GPU kernels are compiled in the midst of it, while others wait.
    timeout = 60.0 if loop.form.device == "cpu" else 300.0
    return run_loopback(lambda group: Server(loop, group).run(steps), loop.form.cp_size, timeout)[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--only", type=int, help="one loop of that seed")
    parser.add_argument("--device", default="cpu", help="or cuda, whose ranks are threads")
    parser.add_argument("--processes", action="store_true", help=f"{PROCESSES} processes over gloo in the place of threads")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"seed {given.seed}", flush=True)
    kinds, caches, number, loops, said = Counter[str](), Counter[str](), given.only or 0, 0, time.monotonic()
    ranks = ProcessRanks(PROCESSES) if given.processes else None
    try:
        while kinds.total() < given.steps:
            loop = draw(given.seed, number, PROCESSES if ranks else None, given.device)
            steps = min(STEPS, given.steps - kinds.total())
            done = ranks.run(serve, loop, steps)[0] if ranks else serve_on_loopback(loop, steps)
            kinds += done
            caches[loop.kind] += steps
            number, loops = number + 1, loops + 1
            if given.only is not None:
                break
            if time.monotonic() - said > 30:
                said = time.monotonic()
                print(f"{kinds.total():,} steps of {loops:,} loops", flush=True)
    except BaseException:
        print(f"failed in loop {number} of seed {given.seed}, after {kinds.total():,} steps", flush=True)
        raise
    finally:
        if ranks is not None:
            ranks.close()
    print(f"all right: {kinds.total():,} steps of {loops:,} loops over {'gloo' if ranks else 'loopback'}; seed {given.seed}")
    for counts in (kinds, caches):
        print("; ".join(f"{what}: {count:,}" for what, count in sorted(counts.items())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
