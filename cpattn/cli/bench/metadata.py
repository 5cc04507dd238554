"""Building one rank's metadata, all tensors, from the list of requests."""

from __future__ import annotations

from functools import partial

import cpattn
from cpattn.cli.bench.asked import Asked, Result, record
from cpattn.cli.bench.device import device, timings

TITLE = "building one rank's metadata, all tensors"
TOKENS, TOKENS_HELP = {"cuda": 900, "cpu": 900}, "new tokens of a request, on average (default: 900)"
CP_HELP = "number of ranks (default: 4, 8 and 64, one after another)"
RESULTS = "benchmarks/results/metadata_cpu.md"
LEFT: tuple[int, ...] = ()
HAS_SHAPE = False
_TENSORS = ("chunk_request", "cu_seqlens_q", "k_len", "k_start", "token_index", "position_ids", "restore_index")


def measure(asked: Asked) -> Result:
    """Times each number of requests over each number of ranks."""
    batches = [_made_batch(requests, asked.tokens) for requests in (1, 8, 64, 256)] if asked.batch is None else [asked.batch]
    cp_sizes = (4, 8, 64) if asked.cp_size is None else (asked.cp_size,)
    plans = {f"{len(batch)} {cp_size}": cpattn.plan(batch, cp_size) for batch in batches for cp_size in cp_sizes}
    medians = timings({name: partial(_build, plan) for name, plan in plans.items()}, asked.seconds)
    lines = [[f"{len(plan.batch):,}", str(plan.cp_size), f"{medians[name].p50 * 1e6:,.0f}"] for name, plan in plans.items()]
    records = [record(asked.written or f"{len(plan.batch)} requests", plan, medians[name]) for name, plan in plans.items()]
    return Result(["requests", "cp_size", "us"], lines, records, f"medians; on {device().type}")


def _made_batch(requests: int, tokens: int) -> list[tuple[int, int]]:
    return [((i * 997) % 8192, 1 + (i * 531) % (2 * tokens)) for i in range(requests)]


def _build(plan: cpattn.Plan) -> None:
    """The plan as well: from nothing but the batch."""
    meta = cpattn.build_metadata(plan.batch, plan.cp_size, min(1, plan.cp_size - 1), device())
    for name in _TENSORS:
        getattr(meta, name)
