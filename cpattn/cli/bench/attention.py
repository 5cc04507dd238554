"""One rank's attention launch, with each backend that can serve it."""

from __future__ import annotations

from functools import partial

import cpattn
from cpattn.attention.backend import AttentionOptions
from cpattn.cli.bench.device import device, median_seconds
from cpattn.cli.bench.sizes import CP_SIZE, batches, flops, sizes, speed
from cpattn.keys import Keys
from cpattn.spans import Spans

TITLE = "one rank's attention launch, with each backend that can serve it"
TOKENS, TOKENS_HELP = 4096, "new tokens of the whole batch"
RESULTS = "benchmarks/results/attention_gpu.md and attention_cpu.md"
LEFT = (0, 1)


def measure(tokens: int, seconds: float) -> tuple[list[str], list[list[str]], str]:
    """Header, rows and a note."""
    used, rank, table = sizes(), CP_SIZE // 2, []
    named = batches(tokens)
    for name, batch in named.items():
        plan = cpattn.plan(batch, CP_SIZE)
        meta = plan.metadata(rank, device())
        chunks = meta.chunk_host
        spans = Spans.build(
            chunks.q_len, meta.k_starts[chunks.request], chunks.k_len, chunks.k_len - chunks.q_len + 1, device(), chunks.request
        )
        q = used.tensors(meta.num_tokens)[0]
        _, k, v = used.tensors(int(plan.total_lens.sum()))
        explained = cpattn.explain(*used.tensors(meta.rows), meta, strategy="all_gather")
        # The reference is for checking: on large batches it takes forever.
        able = [backend for backend, reason in explained.items() if reason.startswith(("chosen", "able")) and backend != "reference"]
        options = AttentionOptions(scale=used.head_dim**-0.5)
        variants = {backend: partial(cpattn.BACKENDS[backend].attend, q, Keys(k, v), spans, options, q.dtype) for backend in able}
        for backend, median in median_seconds(variants, seconds / len(named)).items():
            table.append([name, backend, f"{median * 1e3:,.2f}", speed(flops(plan, rank, used), median)])
    return ["batch", "backend", "ms", "causal work only"], table, f"medians; rank {rank} of {CP_SIZE}, {used}; no transfers"
