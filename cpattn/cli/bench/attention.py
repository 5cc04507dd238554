"""One rank's attention launch, with each backend that can serve it."""

from __future__ import annotations

from functools import partial

import cpattn
from cpattn.attention.backend import AttentionOptions
from cpattn.cli.bench.asked import Asked, Result, record
from cpattn.cli.bench.device import device, timings
from cpattn.cli.speed import in_flops
from cpattn.keys import Keys
from cpattn.spans import Spans

TITLE = "one rank's attention launch, with each backend that can serve it"
# So that a CPU takes seconds as well: it does some 30 GFLOP/s, where a GPU does 500 TFLOP/s.
TOKENS, TOKENS_HELP = {"cuda": 4096, "cpu": 1024}, "new tokens of the whole batch (default: 4096, on a CPU 1024)"
CP_HELP = "number of ranks; the one in the middle is measured (default: 4)"
RESULTS = "benchmarks/results/attention_gpu.md and attention_cpu.md"
LEFT = (0, 1)
HAS_SHAPE = True


def measure(asked: Asked) -> Result:
    """Times each batch with each backend."""
    lines, records = [], []
    plans = asked.plans()
    for name, plan in plans.items():
        rank = plan.cp_size // 2
        meta = plan.metadata(rank, device())
        chunks = meta.chunk_host
        spans = Spans.build(
            chunks.q_len, meta.k_starts[chunks.request], chunks.k_len, chunks.k_len - chunks.q_len + 1, device(), chunks.request
        )
        q = asked.tensors(meta.num_tokens)[0]
        _, k, v = asked.tensors(int(plan.total_lens.sum()))
        explained = cpattn.explain(*asked.tensors(meta.rows), meta, strategy="all_gather")
        # The reference is for checking: on large batches it takes forever.
        able = [backend for backend, reason in explained.items() if reason.startswith(("chosen", "able")) and backend != "reference"]
        options = AttentionOptions(scale=q.shape[2] ** -0.5)
        variants = {backend: partial(cpattn.BACKENDS[backend].attend, q, Keys(k, v), spans, options, q.dtype) for backend in able}
        for backend, timing in timings(variants, asked.seconds / len(plans)).items():
            flops = asked.flops(plan, rank)
            lines.append([name, backend, f"{timing.p50 * 1e3:,.2f}", in_flops(flops / timing.p50)])
            chosen = explained[backend].startswith("chosen")
            records.append(record(name, plan, timing, rank=rank, backend=backend, chosen_by_auto=chosen, flops=flops))
    note = f"medians; the rank in the middle of {plan.cp_size}, {asked.shape}; no transfers"
    return Result(["batch", "backend", "ms", "causal work only"], lines, records, note)
