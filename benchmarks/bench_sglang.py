"""What SGLang's context-parallel strategy and cpattn's cost the host, call by call, in SGLang's own classes.

    make test-engines    # fetches SGLang's wheel
    CPATTN_SGLANG=.venv-engines/sglang PYTHONPATH=.:tests python benchmarks/bench_sglang.py
    CPATTN_SGLANG=.venv-engines/sglang PYTHONPATH=.:tests python benchmarks/bench_sglang.py --device cuda

One rank poses as one of four. Attention kernels are left out, and what would travel is copied, so that the host's work is timed. On a GPU
that is until all is launched.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from engines import sglang_standin
from engines.sglang_batches import Case, Layer, backend_of, forward_batch_of, parallel_of
from timing import percentiles, write_report
from torch import Tensor

import cpattn
from cpattn.integrations.sglang import strategy
from cpattn.integrations.sglang.plugin import strategy_over
from cpattn.testing.solo import SoloCommunicator

CP_SIZE, RANK, PAGE_SIZE = 4, 1, 16
HEADS, KV_HEADS, HEAD_DIM, LAYERS, DTYPE = 8, 2, 64, 36, torch.bfloat16
BATCHES = {
    "1 x 64": [(0, 64)],
    "8 x (64 + 16)": [(64, 16)] * 8,
    "32 x 8": [(0, 8)] * 32,
}
ON_A_CPU = "On a CPU cpattn moves rows by torch, and looks at what a page table holds, in every layer. "
# How they are named in the table, in a forward's order.
CALLS = ("build_metadata", "shard_hidden_states", "shard_position_ids", "a layer", "gather_hidden_states")


def attend(
    q: Tensor, keys: cpattn.Keys, spans: cpattn.Spans, options: cpattn.AttentionOptions, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(q), q.new_zeros(q.shape[:2], dtype=torch.float32)


# As an attention kernel of one launch over pages.
NOTHING = cpattn.Backend(
    name="nothing",
    attend=attend,
    device_types=None,
    dtypes=frozenset({DTYPE}),
    alignments=frozenset({"bottom_right", "full", "any"}),
    window=True,
    softcap=True,
    native_sinks=True,
    v_head_dim=True,
    fp32_out=True,
    reads_pages=lambda problem: True,
)


def host_times(variants: dict[str, Callable[[], Any]], seconds: float, device: str) -> dict[str, np.ndarray]:
    """In turn; a device has done what it was given before the next begins."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, run in variants.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    # What is prepared once for a batch is not a layer's.
    return {name: np.array(values[5:]) for name, values in times.items()}


def case_of(batch: list[tuple[int, int]], device: str) -> Case:
    lengths = [prefix + extend for prefix, extend in batch]
    pages = [-(-n // PAGE_SIZE) * PAGE_SIZE for n in lengths]
    begins = np.cumsum([PAGE_SIZE, *pages]).tolist()
    slots = [torch.arange(begin, begin + n) for begin, n in zip(begins, lengths, strict=False)]
    x = torch.zeros(sum(extend for _, extend in batch), HEADS + 2 * KV_HEADS, HEAD_DIM)
    return Case(batch, slots, PAGE_SIZE, 0, 0, [Layer()], (HEADS, KV_HEADS), [], x, begins[-1]).to(device, DTYPE)


def calls_of(case: Case, own: Any) -> dict[str, Callable[[], Any]]:
    """One rank's calls of a forward, each to be timed by itself."""
    from sglang.srt.layers.cp import base, utils
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    base._STRATEGY = used = own(cp_size=CP_SIZE)
    pool = MHATokenToKVPool(case.num_slots - PAGE_SIZE, PAGE_SIZE, DTYPE, KV_HEADS, HEAD_DIM, 1, case.device, False)
    sglang_standin.RANK.parallel = parallel_of(SoloCommunicator(RANK, CP_SIZE))
    sglang_standin.RANK.backend = backend = backend_of(case, pool)
    batch, planned = forward_batch_of(case), forward_batch_of(case)
    utils.prepare_cp_forward(batch)
    backend.init_forward_metadata(batch)
    local = used.shard_hidden_states(case.x, batch)
    layer = RadixAttention(HEADS, HEAD_DIM, HEAD_DIM**-0.5, KV_HEADS, 0)
    q, k, v = (part.contiguous().flatten(1) for part in local.tensor_split([HEADS, HEADS + KV_HEADS], dim=1))

    def build() -> None:
        planned.attn_cp_metadata = None
        utils.prepare_cp_forward(planned)

    calls = (
        build,
        lambda: used.shard_hidden_states(case.x, batch),
        lambda: used.shard_position_ids(batch.positions, batch),
        lambda: layer(q, k, v, batch),
        lambda: used.gather_hidden_states(q, batch),
    )

    def run(call: Callable[[], Any]) -> Any:
        base._STRATEGY, sglang_standin.RANK.backend = used, backend
        return call()

    return {name: partial(run, call) for name, call in zip(CALLS, calls, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    device = parser.parse_args().device
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    vars(strategy)["cp_attention"] = partial(cpattn.cp_attention, backend=NOTHING)
    rows = []
    with sglang_standin.standing_in(device) as release, torch.inference_mode():
        from sglang.srt.layers.attention import flashattention_backend
        from sglang.srt.layers.cp.zigzag import ZigzagCPStrategy

        flashattention_backend.flash_attn_with_kvcache = lambda q, **_: torch.zeros_like(q)
        for name, batch in BATCHES.items():
            case = case_of(batch, device)
            theirs, ours = (calls_of(case, own) for own in (ZigzagCPStrategy, strategy_over(ZigzagCPStrategy)))
            forward = np.zeros(2)
            for call in CALLS:
                times = host_times({"SGLang": theirs[call], "cpattn": ours[call]}, 2.0, device)
                rows.append([name, call, *(percentiles(times[who]) for who in ("SGLang", "cpattn"))])
                if call == "a layer":
                    with mock.patch.dict(vars(strategy), cp_attention=lambda q, *_, **options: q):
                        alone = host_times({"cpattn": ours[call]}, 0.5, device)["cpattn"]
                    rows.append([name, "of it all but `cp_attention`", "", percentiles(alone)])
                forward += [np.median(times[who]) * (LAYERS if call == "a layer" else 1) * 1e6 for who in ("SGLang", "cpattn")]
            rows.append([name, f"a forward of {LAYERS} layers", *(f"{total:,.0f}" for total in forward)])
    where = "a CPU" if device == "cpu" else f"one {torch.cuda.get_device_name()}"
    notes = (
        f"Host time of one rank of {CP_SIZE}, us, on {where}. SGLang {release}; {HEADS} and {KV_HEADS} heads of {HEAD_DIM} in bf16, "
        "without attention kernels. What would travel is copied. build_metadata has SGLang's padding with it. A layer is SGLang's "
        "RadixAttention with its own backend and pool around the strategy; SGLang's writes to the pool are torch's here. "
        f"{ON_A_CPU if device == 'cpu' else ''}Load average at the start: {load:.1f}."
    )
    header = ["batch", "call", "SGLang", "cpattn"]
    write_report(f"sglang_host_{device}", "Host time of SGLang's strategy and of cpattn's", header, rows, notes)


if __name__ == "__main__":
    main()
