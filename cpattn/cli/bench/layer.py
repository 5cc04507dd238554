"""One rank's whole call of cp_attention, with each strategy; transfers are copies on this device."""

from __future__ import annotations

from functools import partial

import cpattn
from cpattn.cli.bench.asked import Asked, Result, record
from cpattn.cli.bench.device import device, timings
from cpattn.cli.speed import in_flops
from cpattn.exchange.registry import able_strategies
from cpattn.testing import SoloCommunicator

TITLE = "one rank's whole call of cp_attention, with each strategy"
# So that a CPU takes seconds as well: it does some 30 GFLOP/s, where a GPU does 500 TFLOP/s.
TOKENS, TOKENS_HELP = {"cuda": 4096, "cpu": 1024}, "new tokens of the whole batch (default: 4096, on a CPU 1024)"
CP_HELP = "number of ranks; the one in the middle is measured (default: 4)"
RESULTS = "benchmarks/results/layer_gpu.md"
LEFT = (0, 1, 2)
HAS_SHAPE = True


def measure(asked: Asked) -> Result:
    """Times each batch with each strategy."""
    lines, records = [], []
    plans = asked.plans()
    for name, plan in plans.items():
        rank = plan.cp_size // 2
        meta = plan.metadata(rank, device())
        q, k, v = asked.tensors(meta.rows)
        cache = cpattn.PackedKV(*asked.tensors(plan.num_prefix_tokens)[1:])
        group = SoloCommunicator(rank, plan.cp_size)
        call = cpattn.prepare(q, k, v, meta, group=group, kv_cache=cache)
        variants = {
            strategy.name: partial(cpattn.cp_attention, q, k, v, meta, group=group, kv_cache=cache, strategy=strategy.name)
            for strategy in able_strategies(call.problem, plan)
        }
        for strategy, timing in timings(variants, asked.seconds / len(plans)).items():
            flops = asked.flops(plan, rank)
            backend = cpattn.prepare(q, k, v, meta, group=group, kv_cache=cache, strategy=strategy).backend.name
            lines.append([name, strategy, backend, f"{timing.p50 * 1e3:,.2f}", in_flops(flops / timing.p50)])
            chosen = strategy == call.strategy.name
            records.append(record(name, plan, timing, rank=rank, strategy=strategy, backend=backend, chosen_by_auto=chosen, flops=flops))
    note = f"medians; the rank in the middle of {plan.cp_size}, {asked.shape}; messages of other ranks are copies on this device"
    return Result(["batch", "strategy", "backend", "ms", "causal work only"], lines, records, note)
