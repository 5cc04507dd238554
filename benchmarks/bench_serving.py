"""One layer of a serving step over pages, one rank's work: replicated and sharded, beside all of it on one rank.

PYTHONPATH=. python benchmarks/bench_serving.py [--results FOLDER]     # on CUDA where there is a GPU, else on the CPU
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timing import RESULTS, interleaved, write_report

import cpattn
from cpattn.testing import SoloCommunicator

CP_SIZE = 4
HEADER = [
    "batch", "cache", "strategy", "p20, ms", "p50, ms", "p80, ms", "ratio to one rank", "eager p50, ms", "sent, MB", "pages, MB",
]  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What is timed where: the real sizes on a GPU, smaller ones on a CPU."""

    device: str
    dtype: torch.dtype
    backend: str
    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    batches: dict[str, list[tuple[int, int]]]


GPU = Setting(
    "cuda", torch.bfloat16, "triton", 32, 8, 128, 64,
    {
        "decode: 256 x (8k + 1)": [(8192, 1)] * 256,
        "chunked prefill: 30k + 2,048": [(30720, 2048)],
        "mixed: 128 x (8k + 1), 30k + 1,920": [(8192, 1)] * 128 + [(30720, 1920)],
    },
)  # fmt: skip
CPU = Setting(
    "cpu", torch.float32, "cpu", 8, 2, 64, 64,
    {
        "decode: 64 x (1k + 1)": [(1024, 1)] * 64,
        "chunked prefill: 7,680 + 512": [(7680, 512)],
        "mixed: 32 x (1k + 1), 7,680 + 480": [(1024, 1)] * 32 + [(7680, 480)],
    },
)  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """One way of computing a batch: ready to run, what it sends, and the pages that it needs on a rank."""

    run: Callable[[], Any]
    bytes_sent: int
    page_bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=15, help="on a GPU, of each variant")
    parser.add_argument("--seconds", type=float, default=5.0, help="on a CPU, for each batch")
    options = parser.parse_args()
    setting = GPU if options.device == "cuda" else CPU
    torch.set_num_threads(1)  # of a rank
    table: list[list[str]] = []
    for name, batch in setting.batches.items():
        table += measure(name, batch, setting, options.rounds, options.seconds)
        if setting.device == "cuda":
            torch.cuda.empty_cache()
    title = f"One layer of a serving step: one rank of {CP_SIZE}, beside one rank alone"
    notes = (
        f"{str(setting.dtype).removeprefix('torch.')}, {setting.heads} query and {setting.kv_heads} key/value heads, D = "
        f"{setting.head_dim}, pages of {setting.page_size} tokens, backend {setting.backend}. A step writes the new keys and values to the "
        "pages and attends. `one rank`: cp_size 1, all queries over all keys. The others: the work of the rank in the middle of "
        f"{CP_SIZE}, transfers as local copies on the same device, so that nothing hides them; a quarter of the queries over all keys "
        "(replicated), or all queries over a quarter of the keys (sharded). Sent and pages: of this rank, for one layer. "
    )
    if setting.device == "cuda":
        from gpu_report import write_gpu_report

        notes += (
            "Times are of CUDA graphs, the eager ones of calls; variants ran interleaved in random order, each after a rest and a flush of "
            "the L2 cache."
        )
        write_gpu_report("serving_gpu", title, HEADER, table, notes, options.results)
    else:
        notes += (
            "Smaller than what bench_serving.py times on a GPU. This backend reads no pages: keys are copied out of them in every call, "
            "which is most of the time of a decode step; of replicated pages every rank copies all."
        )
        header = [name for name in HEADER if not name.startswith("eager")]
        rows = [[cell for name, cell in zip(HEADER, line, strict=True) if name in header] for line in table]
        write_report("serving_cpu", title, header, rows, notes, options.results)
        with (options.results / "serving_cpu.csv").open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([header, *rows])


def measure(name: str, batch: list[tuple[int, int]], setting: Setting, rounds: int, seconds: float) -> list[list[str]]:
    variants = {("-", "one rank"): one_rank_of(batch, setting, 1, "all_gather", sharded=False)}
    variants["replicated", "all_gather"] = one_rank_of(batch, setting, CP_SIZE, "all_gather", sharded=False)
    decodes = all(extend == 1 for _, extend in batch)
    # The ring would send the whole cache around for every new token.
    for strategy in ("pass_q", "pass_q_ring") if decodes else ("pass_q", "pass_q_ring", "ring"):
        variants["sharded", strategy] = one_rank_of(batch, setting, CP_SIZE, strategy, sharded=True)
    runs = {" ".join(key): variant.run for key, variant in variants.items()}
    if setting.device == "cuda":
        from gpu_timing import gpu_seconds

        times, eager = gpu_seconds(runs, rounds), gpu_seconds(runs, rounds, graph=False)
    else:
        times = eager = interleaved(runs, seconds)
    alone = np.median(times["- one rank"])
    lines = []
    for (cache, strategy), variant in variants.items():
        key = f"{cache} {strategy}"
        cells = [f"{value * 1e3:,.3f}" for value in np.percentile(times[key], [20, 50, 80])]
        ratio, eager_ms = f"{np.median(times[key]) / alone:.3f}", f"{np.median(eager[key]) * 1e3:,.3f}"
        lines.append(
            [name, cache, strategy, *cells, ratio, eager_ms, f"{variant.bytes_sent / 1e6:,.2f}", f"{variant.page_bytes / 1e6:,.1f}"]
        )
        print(lines[-1], flush=True)
    return lines


def one_rank_of(batch: list[tuple[int, int]], setting: Setting, cp_size: int, strategy: str, sharded: bool) -> Variant:
    """The step of the rank in the middle, over pages in random order."""
    shards = [[prefix // cp_size + (rank < prefix % cp_size) for rank in range(cp_size)] for prefix, _ in batch] if sharded else None
    plan, rank = cpattn.plan(batch, cp_size, prefix_shards=shards), cp_size // 2
    meta = plan.metadata(rank, setting.device)
    held = plan.shard_lens + plan.rank_extends if sharded else plan.total_lens[:, None]
    pages = -(-held // setting.page_size)
    counts = pages[:, rank if sharded else 0]
    # As wide on every rank; this rank's pages in random order.
    order = np.random.default_rng(0).permutation(int(counts.sum()))
    page_table = np.zeros((len(batch), int(pages.max())), dtype=np.int32)
    page_table[np.arange(page_table.shape[1]) < counts[:, None]] = order
    torch.manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=setting.dtype, device=setting.device)

    page_shape = (len(order), setting.page_size, setting.kv_heads, setting.head_dim)
    cache = cpattn.PagedKV(normal(*page_shape), normal(*page_shape), torch.from_numpy(page_table).to(setting.device))
    q = normal(meta.rows, setting.heads, setting.head_dim)
    k, v = (normal(meta.rows, setting.kv_heads, setting.head_dim) for _ in range(2))
    communicator = SoloCommunicator(rank, cp_size)
    run = partial(cpattn.cp_attention, q, k, v, meta, group=communicator, kv_cache=cache, strategy=strategy, backend=setting.backend)
    run()
    return Variant(run, communicator.bytes_sent, 2 * cache.k_pages.nbytes)


if __name__ == "__main__":
    main()
