"""``cpattn demo``: the main job, over real processes, checked against the float64 oracle."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import cpattn
from cpattn.cli.batch_file import read_batch
from cpattn.errors import CPError, HeadCountError, PlanError
from cpattn.exchange.communicator import as_communicator
from cpattn.metadata.draw import text_table
from cpattn.testing import ProcessRanks, oracle_attention, relative_rmse, rmse, rmse_bound, single_device_bound

_DEFAULT_BATCH = Path(__file__).parents[2] / "examples" / "batches" / "mixed.json"
# What runs where there is no checkout beside the package, and so no batch file.
_BUILT_IN_BATCH = [(0, 600), (512, 130), (0, 7), (997, 1), (64, 0), (0, 1)]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TIMED_RUNS = 3


@dataclass(frozen=True)
class Setting:
    """What every rank needs to know to make the same tensors."""

    plan: cpattn.Plan
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    seed: int

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, cpattn.PackedKV]:
        """q, k and v of the whole batch, and the cached prefix: the same on every rank."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(rows: int, heads: int) -> Tensor:
            return torch.randn(rows, heads, self.head_dim, generator=generator).to(self.dtype)

        tokens, cached = self.plan.num_tokens, self.plan.num_prefix_tokens
        q, k, v = normal(tokens, self.heads), normal(tokens, self.kv_heads), normal(tokens, self.kv_heads)
        return q, k, v, cpattn.PackedKV(normal(cached, self.kv_heads), normal(cached, self.kv_heads))


@dataclass(frozen=True)
class RankResult:
    """What one rank gives back: its rows, the median time of a call in seconds, and the bytes it sent in one."""

    out: Tensor
    lse: Tensor
    seconds: float
    bytes_sent: int
    restored: bool


def add_command(commands: Any) -> None:
    """Registers the command with the parser."""
    parser = commands.add_parser(
        "demo",
        help="run a ragged batch over several processes and check every output against float64",
        description="Starts several processes on this machine, runs both exchange strategies over gloo on the CPU, and compares each "
        "rank's output with a float64 oracle. Exit code 0: all exact; 1: an output was off; 2: bad input.",
    )
    parser.add_argument("--batch", type=Path, metavar="FILE", help="JSON list of requests (default: examples/batches/mixed.json)")
    parser.add_argument("--cp", type=int, default=4, metavar="N", help="number of ranks, a process each (default: 4)")
    parser.add_argument("--heads", type=int, default=8, metavar="N", help="query heads (default: 8)")
    parser.add_argument("--kv-heads", type=int, metavar="N", help="key/value heads (default: a quarter of the query heads, at least 1)")
    parser.add_argument("--head-dim", type=int, default=64, metavar="N", help="size of a head (default: 64)")
    parser.add_argument("--dtype", choices=sorted(_DTYPES), default="bfloat16", help="of q, k and v (default: bfloat16)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random tensors (default: 0)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the demo. Returns 0 if every output is as exact as on one device, else 1."""
    setting = _setting(options)
    plan = setting.plan
    print(plan.summary(), plan.draw(), sep="\n\n")
    print(
        f"\n{setting.heads} query heads, {setting.kv_heads} key/value heads of {setting.head_dim}, {options.dtype}, seed {setting.seed}; "
        f"starting {plan.cp_size} processes over gloo ...",
        flush=True,
    )
    expected, expected_lse, alone, alone_seconds = _single_process(setting)
    alone_rmse = relative_rmse(alone, expected)
    alone_bound = single_device_bound(setting.dtype, expected_lse)
    all_fine = alone_rmse <= alone_bound
    verdict = "yes" if all_fine else "NO"
    table = [["one process", _error(alone, expected), f"{alone_rmse:.2e}", f"{alone_bound:.2e}", verdict, f"{alone_seconds * 1e3:.1f}", ""]]
    with ProcessRanks(plan.cp_size) as ranks:
        for name, strategy in cpattn.STRATEGIES.items():
            results = ranks.run(rank_program, setting, name)
            out, lse = _in_order(plan, results)
            error = relative_rmse(out, expected)
            bound = rmse_bound(alone_rmse, setting.dtype, strategy.num_steps(plan, None), expected_lse)
            # The LSE is fp32 whatever the dtype, so its own bound is that of fp32 sums; absolute, as it may be near 0.
            lse_fine = rmse(lse, expected_lse) <= rmse_bound(0.0, torch.float32, plan.cp_size + setting.head_dim, expected_lse)
            fine = error <= bound and lse_fine and all(result.restored for result in results)
            all_fine &= fine
            table.append(
                [
                    name,
                    _error(out, expected),
                    f"{error:.2e}",
                    f"{bound:.2e}",
                    "yes" if fine else "NO",
                    f"{max(result.seconds for result in results) * 1e3:.1f}",
                    f"{max(result.bytes_sent for result in results):,}",
                ]
            )
    header = ["strategy", "largest error", "relative RMSE", "allowed", "exact", "ms (slowest rank)", "bytes sent a rank"]
    print(f"\nagainst float64, over all {plan.num_tokens:,} tokens:\n\n{text_table(header, table)}\n")
    print("every rank's output is as exact as one device's" if all_fine else "an output is OFF: see the table")
    return 0 if all_fine else 1


def rank_program(setting: Setting, strategy: str) -> RankResult:
    """What one rank does, in the middle of the default process group."""
    q, k, v, prefix = setting.tensors()
    meta = setting.plan.metadata(dist.get_rank())
    q_local, k_local, v_local = (cpattn.shard(x, meta) for x in (q, k, v))
    communicator = as_communicator(None, setting.plan.cp_size)

    def attend() -> tuple[Tensor, Tensor]:
        return cpattn.cp_attention(q_local, k_local, v_local, meta, kv_cache=prefix, strategy=strategy, return_lse=True, check=False)

    cpattn.cp_attention(q_local, k_local, v_local, meta, kv_cache=prefix, strategy=strategy, check=True)
    sent_before = communicator.bytes_sent
    out, lse = attend()
    bytes_sent = communicator.bytes_sent - sent_before
    seconds = _median_seconds(attend)
    # What a model does at its end: bring everything back into the original order, on every rank.
    restored = torch.equal(cpattn.unshard(q_local, meta), q)
    return RankResult(out, lse, seconds, bytes_sent, restored)


def _setting(options: argparse.Namespace) -> Setting:
    if options.batch is not None:
        batch = read_batch(options.batch)
    else:
        batch = read_batch(_DEFAULT_BATCH) if _DEFAULT_BATCH.exists() else _BUILT_IN_BATCH
    if options.cp > 64:
        raise PlanError(f"--cp {options.cp} would start as many processes; the demo starts 64 at most")
    plan = cpattn.plan(batch, options.cp)
    kv_heads = options.kv_heads if options.kv_heads is not None else (options.heads // 4 if options.heads % 4 == 0 else 1)
    if options.heads < 1 or kv_heads < 1 or options.heads % kv_heads:
        raise HeadCountError(
            f"--heads {options.heads} --kv-heads {kv_heads}: query heads must be a multiple of key/value heads, both at least 1"
        )
    if options.head_dim < 1:
        raise CPError(f"--head-dim {options.head_dim}: it must be at least 1")
    return Setting(plan, options.heads, kv_heads, options.head_dim, _DTYPES[options.dtype], options.seed)


def _single_process(setting: Setting) -> tuple[Tensor, Tensor, Tensor, float]:
    """The oracle's output and LSE, the same backend's output without splitting, and its time."""
    q, k, v, prefix = setting.tensors()
    batch = setting.plan.batch
    expected, expected_lse = oracle_attention(q, k, v, batch, prefix_k=prefix.k, prefix_v=prefix.v)
    meta = cpattn.build_metadata(batch, cp_size=1, cp_rank=0)

    def attend() -> Tensor:
        return cpattn.cp_attention(q, k, v, meta, kv_cache=prefix)

    return expected, expected_lse, attend(), _median_seconds(attend)


def _in_order(plan: cpattn.Plan, results: list[RankResult]) -> tuple[Tensor, Tensor]:
    """The ranks' rows put where their own metadata says, independently of unshard."""
    out = torch.full((plan.num_tokens, *results[0].out.shape[1:]), torch.nan, dtype=results[0].out.dtype)
    lse = torch.full((plan.num_tokens, *results[0].lse.shape[1:]), torch.nan)
    for rank, result in enumerate(results):
        meta = plan.metadata(rank)
        tokens = meta.token_index[: meta.num_tokens]
        out[tokens] = result.out[: meta.num_tokens]
        lse[tokens] = result.lse[: meta.num_tokens]
    return out, lse


def _error(out: Tensor, expected: Tensor) -> str:
    return f"{(out.double() - expected).abs().max().item():.2e}" if len(out) else "0"


def _median_seconds(function: Any) -> float:
    times = []
    for _ in range(_TIMED_RUNS):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return sorted(times)[_TIMED_RUNS // 2]
