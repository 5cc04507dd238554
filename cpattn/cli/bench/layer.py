"""One rank's whole call of cp_attention, with each strategy; transfers are copies on this device."""

from __future__ import annotations

from functools import partial

import cpattn
from cpattn.cli.bench.device import device, median_seconds
from cpattn.cli.bench.sizes import CP_SIZE, batches, flops, sizes, speed
from cpattn.exchange.registry import able_strategies
from cpattn.testing import SoloCommunicator

TITLE = "one rank's whole call of cp_attention, with each strategy"
TOKENS, TOKENS_HELP = 4096, "new tokens of the whole batch"
RESULTS = "benchmarks/results/layer_gpu.md"
LEFT = (0, 1)


def measure(tokens: int, seconds: float) -> tuple[list[str], list[list[str]], str]:
    """Header, rows and a note."""
    used, rank, table = sizes(), CP_SIZE // 2, []
    named = batches(tokens)
    for name, batch in named.items():
        plan = cpattn.plan(batch, CP_SIZE)
        meta = plan.metadata(rank, device())
        q, k, v = used.tensors(meta.rows)
        cache = cpattn.PackedKV(*used.tensors(plan.num_prefix_tokens)[1:])
        group = SoloCommunicator(rank, CP_SIZE)
        problem = cpattn.prepare(q, k, v, meta, group=group, kv_cache=cache).problem
        variants = {
            strategy.name: partial(cpattn.cp_attention, q, k, v, meta, group=group, kv_cache=cache, strategy=strategy.name)
            for strategy in able_strategies(problem, plan)
        }
        for strategy, median in median_seconds(variants, seconds / len(named)).items():
            table.append([name, strategy, f"{median * 1e3:,.2f}", speed(flops(plan, rank, used), median)])
    note = f"medians; rank {rank} of {CP_SIZE}, {used}; what the others would send is a copy on this device"
    return ["batch", "strategy", "ms", "causal work only"], table, note
