"""What a KV cache takes on each rank, by the sizes of the library's own pages: computed, not measured.

PYTHONPATH=. python benchmarks/cache_memory.py [--results FOLDER]
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import NamedTuple

import torch

import cpattn

RESULTS = Path(__file__).parent / "results"
# In the shape of Llama 3.1 70B.
LAYERS, KV_HEADS, HEAD_DIM, PAGE_SIZE = 80, 8, 128, 64
RANKS = 8
CONTEXTS = {"128k": 2**17, "256k": 2**18, "512k": 2**19, "1M": 2**20}
HEADER = ["cache", "tokens", "ranks", "GiB a rank"]


class Cache(NamedTuple):
    """How tokens are kept: the numbers, what scales go with them, and whether each lies on one rank alone."""

    dtype: torch.dtype
    scales: str | None = None
    sharded: bool = False

    def bytes_of(self, tokens: int) -> int:
        """On each rank, of a context; sharded over ``RANKS`` ranks, which hold the same number of its pages."""
        pool = cpattn.KVPool(1, PAGE_SIZE, 1, KV_HEADS, HEAD_DIM, dtype=self.dtype, scales=self.scales)
        page = sum(tensor.nbytes for tensor in (pool.k_pages, pool.v_pages, pool.k_scale, pool.v_scale) if tensor is not None)
        pages = -(-tokens // (PAGE_SIZE * (RANKS if self.sharded else 1)))
        return page * pages * LAYERS


CACHES = {
    "replicated, bf16": Cache(torch.bfloat16),
    "replicated, fp8": Cache(torch.float8_e4m3fn, "token"),
    "sharded, bf16": Cache(torch.bfloat16, sharded=True),
    "sharded, fp8": Cache(torch.float8_e4m3fn, "token", sharded=True),
}


def rows() -> list[list[str]]:
    return [
        [name, context, str(RANKS), f"{cache.bytes_of(tokens) / 2**30:.2f}"]
        for context, tokens in CONTEXTS.items()
        for name, cache in CACHES.items()
    ]


def write(results: Path) -> None:
    table = rows()
    with (results / "cache_memory.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([HEADER, *table])
    lines = [
        "# What a KV cache takes on each rank",
        "",
        "`python benchmarks/cache_memory.py`",
        "",
        "Computed from the sizes of a `KVPool`'s pages and scales, not measured.",
        f"One request on {RANKS} ranks; {LAYERS} layers, {KV_HEADS} KV heads, D = {HEAD_DIM}, pages of {PAGE_SIZE} tokens.",
        "In fp8 each token and head has a scale of four bytes for K and one for V. Pages for new tokens are not counted.",
        "",
        *("| " + " | ".join(row) + " |" for row in (HEADER, ["---"] * len(HEADER), *table)),
    ]
    (results / "cache_memory.md").write_text("\n".join(lines) + "\n")


def draw(results: Path) -> None:
    """Needs matplotlib."""
    from gpu_report import draw_bars

    groups: dict[str, dict[str, float]] = {}
    with (results / "cache_memory.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            groups.setdefault(f"{row['tokens']} tokens", {})[row["cache"]] = float(row["GiB a rank"])
    title = f"KV cache of one request on each of {RANKS} ranks: {LAYERS} layers, {KV_HEADS} KV heads, D = {HEAD_DIM} (computed)"
    draw_bars(results / "cache_memory.png", title, {"GiB a rank": groups}, digits=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    write(options.results)
    draw(options.results)


if __name__ == "__main__":
    main()
