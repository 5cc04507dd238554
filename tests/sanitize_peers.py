"""The kernels over peers' memory under compute-sanitizer, in small calls: those that post, wait, pull and bring late keys.

PYTHONPATH=. python tests/sanitize_peers.py [--sanitizer compute-sanitizer] [--calls 1]

Ranks that are threads share one GPU, under the checkers of memory, of races and of what was never written; ranks that are processes have
a GPU each, where there are two, under that of memory. All run side by side. What the flags of several ranks order lies in global memory,
which the race checker does not look at: it is about the shared memory of a program. The checker of what was never written does not see
what another process has written, so it is for threads alone. Those two take minutes for a call: --calls takes the first ones alone.
Other kernels run unchecked: ``make sanitize`` has them.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from tempfile import TemporaryFile
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from inputs.cases import AttentionCase

import cpattn
from cpattn.exchange import late_keys
from cpattn.testing import ProcessRanks, run_loopback

# Strategy, cache, and groups of heads. Where the backend waits for keys those of the first one come late: of one group of heads, and into
# pages only from thousands of tokens on.
CALLS = [
    ("all_gather", "packed", 1),
    ("all_gather", "packed", 2),
    ("all_gather", "paged", 1),
    ("ring", "packed", None),
    ("pass_q", "sharded", None),
]
BATCH = [(37, 90), (0, 3), (8, 1)]
KERNELS = ("exchange_", "post_", "pull_", "await_", "end_copy")
MOST_SECONDS = 300
SUMMARY = re.compile(r"(ERROR SUMMARY|RACECHECK SUMMARY): (.*)")


class Run(NamedTuple):
    """One of the runs side by side."""

    tool: str
    ranks: str
    calls: int

    def command(self, sanitizer: str, port: int) -> list[str]:
        kernels = [part for name in KERNELS for part in ("--kernel-name", f"kernel_substring={name}")]
        checked = [sanitizer, "--tool", self.tool, "--error-exitcode", "1", "--report-api-errors", "no", "--port", str(port), *kernels]
        return [*checked, sys.executable, __file__, "--ranks", self.ranks, "--calls", str(self.calls)]


def calls(transport: cpattn.Transport, many: int) -> None:
    """Small calls over a transport, so many of them, each twice over the same memory."""
    for strategy, cache, overlap in CALLS[:many]:
        case = AttentionCase(
            BATCH, heads=4, kv_heads=2, head_dim=64, dtype=torch.bfloat16, device="cuda", cache=cache, overlap=overlap, page_size=16
        )
        plan = case.plan(transport.size)
        for check in (False, True):
            result = case.on_rank(plan, transport.rank, transport, strategy, "triton", check=check)
        case.check([result], plan, strategy, "triton")
    torch.cuda.synchronize()
    cpattn.check(transport)


def on_threads(many: int) -> None:
    for some, messages in ways(many):
        with messages:
            run_loopback(lambda group: calls(cpattn.transport(group, kind="peer_memory"), some), size=3, timeout=120)  # noqa: B023


def in_process(many: int) -> None:
    assert dist.is_initialized()
    for some, messages in ways(many):
        with messages:
            calls(cpattn.transport(kind="peer_memory"), some)


def ways(many: int) -> list[tuple[int, AbstractContextManager[object]]]:
    """So many calls as they are; and the first one, whose keys alone come late, by the programs of long messages, which these calls have
    none of."""
    return [(many, nullcontext()), (min(many, 1), patch.object(late_keys, "_SHORT_BYTES", 0))]


def on_processes(many: int) -> None:
    with ProcessRanks(2, timeout=120, transport="nccl") as ranks:
        ranks.run(in_process, many)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sanitizer", default=shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer")
    parser.add_argument("--ranks", choices=["threads", "processes"], help="the calls themselves, unchecked")
    parser.add_argument("--calls", type=int, default=len(CALLS))
    given = parser.parse_args()
    if given.ranks is not None:
        (on_threads if given.ranks == "threads" else on_processes)(given.calls)
        return 0
    if not torch.cuda.is_available() or not (shutil.which(given.sanitizer) or Path(given.sanitizer).exists()):
        print(f"it takes a GPU, and {given.sanitizer}: that of CUDA's toolkit, or of nvidia-cuda-sanitizer-api from PyPI", file=sys.stderr)
        return 2
    gpus = torch.cuda.device_count()
    runs = [Run(tool, "threads", given.calls) for tool in ("memcheck", "racecheck", "initcheck")]
    runs += [Run("memcheck", "processes", given.calls)] * (gpus > 1)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
    started = []
    for number, run in enumerate(runs):
        # Each tensor in memory of its own: beside torch's, which gives one piece to several, what is read beyond an end is not seen.
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        if run.ranks == "threads":
            environment["CUDA_VISIBLE_DEVICES"] = visible[number % gpus]
        command = run.command(given.sanitizer, 49152 + 200 * number)
        # No pipe: a full one would hold a run up while another is waited for, and what a killed one has started would keep it open.
        output = TemporaryFile("w+")  # noqa: SIM115 - it goes with the program
        started.append((run, subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT), output))
    failed = 0
    end = time.monotonic() + MOST_SECONDS
    for run, process, output in started:
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        output.seek(0)
        said = output.read()
        found = " ".join(match.group(2) for match in SUMMARY.finditer(said)) or "it did not end as it should"
        print(f"{run.tool}, ranks as {run.ranks}: {found}", flush=True)
        if process.returncode:
            failed += 1
            print(said[-6000:], flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
