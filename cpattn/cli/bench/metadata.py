"""Building one rank's metadata, all tensors, from the list of requests."""

from __future__ import annotations

from functools import partial

import cpattn
from cpattn.cli.bench.device import device, median_seconds

TITLE = "building one rank's metadata, all tensors"
TOKENS, TOKENS_HELP = 900, "new tokens of a request, on average"
RESULTS = "benchmarks/results/metadata_cpu.md"
LEFT: tuple[int, ...] = ()
_TENSORS = ("chunk_request", "cu_seqlens_q", "k_len", "k_start", "token_index", "position_ids", "restore_index")


def measure(tokens: int, seconds: float) -> tuple[list[str], list[list[str]], str]:
    """Header, rows and a note."""
    cases = [(requests, cp_size) for requests in (1, 8, 64, 256) for cp_size in (4, 8, 64)]
    variants = {f"{requests} {cp_size}": partial(_build, requests, cp_size, tokens) for requests, cp_size in cases}
    medians = median_seconds(variants, seconds)
    table = [[str(requests), str(cp_size), f"{medians[f'{requests} {cp_size}'] * 1e6:,.0f}"] for requests, cp_size in cases]
    return ["requests", "cp_size", "us"], table, f"medians; on {device().type}"


def _build(requests: int, cp_size: int, tokens: int) -> None:
    batch = [((i * 997) % 8192, 1 + (i * 531) % (2 * tokens)) for i in range(requests)]
    meta = cpattn.build_metadata(batch, cp_size, 1, device())
    for name in _TENSORS:
        getattr(meta, name)
