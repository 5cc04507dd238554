"""Backend triton under the release of Triton that is at hand: speed, host time, error. Run it under each release in turn; each
run puts its rows in place of earlier ones of its release, or with --add beside them. A card and a host have good and bad minutes:
to compare releases, run each several times, one after another.

PYTHONPATH=.:/path/to/another/triton python benchmarks/bench_triton_releases.py [--add] [--results FOLDER] [--merge TABLE.csv ...]
"""

from __future__ import annotations

import argparse
import csv
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from gpu_report import RESULTS
from gpu_timing import gpu_seconds
from torch import Tensor

import cpattn
from cpattn.kernels import merge, ragged_attention, release
from cpattn.moves import triton_moves
from cpattn.testing import SoloCommunicator

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
REFERENCE = "3.6"
FIELDS = ["triton", "device", "torch", "kernel", "launch", "batch", "ms", "tflops", "host_us", "host_us_by_triton", "error"]
_CALLS = 20


def batches() -> dict[str, tuple[list[tuple[int, int]], int]]:
    """Each batch and the number of ranks, of which the second is measured."""
    lengths = random.Random(1)
    ragged = [(int(lengths.lognormvariate(8, 0.8)), int(lengths.lognormvariate(6.5, 0.8)) + 8) for _ in range(64)]
    return {
        "1 x 32k, cp 2": ([(0, 32768)], 2),
        "8 x (8k + 8k), cp 4": ([(8192, 8192)] * 8, 4),
        "64 ragged, cp 4": (ragged, 4),
        "1 x 2k, cp 4": ([(0, 2048)], 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--merge", type=Path, nargs="+", help="measure nothing, and take over the rows of these tables")
    parser.add_argument("--add", action="store_true", help="keep earlier runs of this release; the table has medians of all")
    parser.add_argument("--note", default="", help="a sentence for the table")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / "triton_releases.csv"
    for rows in map(read, options.merge) if options.merge else [measure(options.rounds)]:
        kept = [row for row in read(path) if options.add or row["triton"] not in {new["triton"] for new in rows}]
        write(path, sorted(kept + rows, key=lambda row: [int(part) for part in row["triton"].split(".")]), options.note)


def measure(rounds: int) -> list[dict[str, str]]:
    """The rows of this release."""
    rows = []
    hopper = torch.cuda.get_device_capability() == (9, 0)
    device = torch.device("cuda", torch.cuda.current_device())
    release.DIRECT_LAUNCH.is_open(device)
    kernel = "for Hopper" if hopper and release.HOPPER_KERNEL.is_open(device) else "plain"
    launch = "driver" if release.DIRECT_LAUNCH.verdict().used else "Triton"
    for name, (batch, cp_size) in batches().items():
        call, meta = prepared_call(batch, cp_size)
        run = partial(call, "triton")
        result, expected = run().float(), call("torch_flash").float()
        error = float((result - expected).norm() / expected.norm())
        ms = 1e3 * float(np.median(gpu_seconds({name: run}, rounds)[name]))
        host = host_us(run, rounds)
        set_direct(False)
        slow, _ = prepared_call(batch, cp_size)
        host_by_triton = host_us(partial(slow, "triton"), rounds)
        set_direct(launch == "driver")
        tflops = 4 * HEADS * HEAD_DIM * float(meta.plan.rank_pairs[1]) / ms / 1e9
        values = [kernel, launch, name, f"{ms:.3f}", f"{tflops:.0f}", f"{host:.0f}", f"{host_by_triton:.0f}", f"{error:.1e}"]
        rows.append(dict(zip(FIELDS, [triton.__version__, torch.cuda.get_device_name(), torch.__version__, *values], strict=True)))
        print(rows[-1], flush=True)
    return rows


def prepared_call(batch: list[tuple[int, int]], cp_size: int) -> tuple[Callable[[str], Tensor], cpattn.CPMetadata]:
    """One rank's layer by all-gather, the transfers local copies."""
    meta = cpattn.build_metadata(batch, cp_size, 1, device="cuda")
    prefix = meta.plan.num_prefix_tokens
    torch.manual_seed(0)
    q, k, v, cached_k, cached_v = (
        torch.randn(n, heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
        for n, heads in ((meta.rows, HEADS), *((n, KV_HEADS) for n in (meta.rows, meta.rows, prefix, prefix)))
    )
    options: dict[str, Any] = {
        "kv_cache": cpattn.PackedKV(cached_k, cached_v), "group": SoloCommunicator(1, cp_size), "overlap": 1, "strategy": "all_gather",
    }  # fmt: skip
    return lambda backend: cpattn.cp_attention(q, k, v, meta, backend=backend, **options), meta


def host_us(run: Callable[[], Any], rounds: int) -> float:
    """The median of means over calls one after another that are not waited for."""
    means = []
    for round_ in range(-2, rounds):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(_CALLS):
            run()
        mean = (time.perf_counter() - begin) / _CALLS
        torch.cuda.synchronize()
        if round_ >= 0:
            means.append(mean)
    return 1e6 * float(np.median(means))


def set_direct(on: bool) -> None:
    """Whether what is prepared from now on is launched by the CUDA driver."""
    launchers = [ragged_attention._attention, triton_moves._pack, triton_moves._gather, triton_moves._pages, merge._merge]
    specialized = ragged_attention.specialized_kernel(torch.device("cuda", torch.cuda.current_device()))
    if specialized is not None:
        launchers.append(specialized._attention)
    for launcher in launchers:
        launcher.may_skip_binder = on
        launcher.prepared.clear()


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def column(rows: list[dict[str, str]], field: str) -> list[float]:
    return [float(row[field]) for row in rows]


def write(path: Path, rows: list[dict[str, str]], note: str) -> None:
    """The table as CSV, and as Markdown with ratios to the reference."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    header = ["batch", "Triton", "kernel", "launch", "runs", "TFLOP/s", "least to most", f"to {REFERENCE}", "host a call, us",
              "least to most", f"to {REFERENCE}", "launched by Triton, us", "difference from torch_flash"]  # fmt: skip
    lines = [
        "# Backend triton under releases of Triton",
        "",
        "`python benchmarks/bench_triton_releases.py`, under each release in turn",
        "",
        "; ".join(dict.fromkeys(f"{row['device']}, torch {row['torch']}" for row in rows)),
        "",
        f"bf16, {HEADS} query and {KV_HEADS} key/value heads, D = {HEAD_DIM}: one rank's layer by all-gather, the transfers local copies. "
        "TFLOP/s are of causal work in the whole call as a graph, medians of runs after a flush of the L2 cache and a rest. Host "
        f"times are medians of means over {_CALLS} eager calls that are not waited for; beside them those of the same calls with every "
        f"launch left to Triton. Of several runs the table has medians. The kernel for Hopper needs another Gluon than that of Triton 3.5. "
        f"{note}".rstrip(),
        "",
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
    ]
    for batch in dict.fromkeys(row["batch"] for row in rows):
        runs: dict[str, list[dict[str, str]]] = {}
        for row in (row for row in rows if row["batch"] == batch):
            runs.setdefault(row["triton"], []).append(row)
        reference = [row for name, same in runs.items() if name.startswith(REFERENCE) for row in same]
        for name, same in runs.items():
            cells = [batch, name, same[0]["kernel"], same[0]["launch"], str(len(same))]
            for field in ("tflops", "host_us"):
                values, base = column(same, field), column(reference, field)
                ratio = f"{np.median(values) / np.median(base):.3f}" if base else "-"
                cells += [f"{np.median(values):.0f}", f"{min(values):.0f} to {max(values):.0f}", ratio]
            by_triton, error = np.median(column(same, "host_us_by_triton")), max(column(same, "error"))
            lines.append("| " + " | ".join([*cells, f"{by_triton:.0f}", f"{error:.1e}"]) + " |")
    text = "\n".join([*lines, ""])
    print(text)
    path.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
