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
from cpattn.cli.batch_file import BATCH_HELP, read_batch
from cpattn.cli.console import Cell, Styled, print_table, print_title, say
from cpattn.cli.options import DTYPES, add_shape_options, shape_from
from cpattn.cli.plan import print_layout, print_shares
from cpattn.cli.progress import Progress
from cpattn.cli.traffic import Shape, problem_of
from cpattn.errors import CPError, PlanError, shown
from cpattn.exchange.registry import able_strategies
from cpattn.exchange.schedule import num_results
from cpattn.testing import ProcessRanks, oracle_attention, relative_rmse, rmse, rmse_bound, single_device_bound
from cpattn.transports.groups import as_transport

_DEFAULT_BATCH = Path(__file__).parents[2] / "examples" / "batches" / "mixed.json"
# What runs where there is no checkout beside the package, and so no batch file.
_BUILT_IN_BATCH = [(0, 600), (512, 130), (0, 7), (997, 1), (64, 0), (0, 1)]
_TIMED_RUNS = 3
# Of all tensors, and of all heads' query-key pairs: some GiB, and some minutes.
_MOST_NUMBERS, _MOST_SCORES = 2**28, 2**36


@dataclass(frozen=True)
class Setting:
    """What every rank needs to know to make the same tensors."""

    plan: cpattn.Plan
    shape: Shape
    seed: int

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.shape.dtype]

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, cpattn.PackedKV]:
        """q, k and v of the whole batch, and the cached prefix: the same on every rank."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(rows: int, heads: int, head_dim: int) -> Tensor:
            return torch.randn(rows, heads, head_dim, generator=generator).to(self.dtype)

        heads, kv_heads, head_dim, v_head_dim = self.shape[:4]
        tokens, cached = self.plan.num_tokens, self.plan.num_prefix_tokens
        q, k, v = normal(tokens, heads, head_dim), normal(tokens, kv_heads, head_dim), normal(tokens, kv_heads, v_head_dim)
        return q, k, v, cpattn.PackedKV(normal(cached, kv_heads, head_dim), normal(cached, kv_heads, v_head_dim))


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
        help="run a batch over several processes and check every output against float64",
        description="Starts several processes on this machine, runs each exchange strategy over gloo on the CPU, and compares all "
        "outputs with a float64 oracle. Exit code 0: all exact; 1: an output was off; 2: bad input.",
    )
    parser.add_argument(
        "--batch",
        metavar="BATCH",
        help=f"{BATCH_HELP} (default: {_default_in_words()})",
    )
    parser.add_argument("--cp", type=int, default=4, metavar="N", help="number of ranks, a process each (default: 4)")
    add_shape_options(parser, heads=8, head_dim=64)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random tensors (default: 0)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the demo. Returns 0 if every output is as exact as on one device, else 1."""
    setting = _setting(options)
    plan = setting.plan
    print_shares(plan)
    print_title("who owns which token")
    print_layout(plan)
    print()
    say(f"{setting.shape}, seed {setting.seed}; {plan.cp_size} processes over gloo")
    table, all_fine = _measure(setting)
    header = ["strategy", "max error", "relative RMSE", "allowed", "exact", "ms", "bytes sent"]
    print_title(f"against float64, over all {plan.num_tokens:,} tokens")
    print_table(header, table)
    print("\nms: of a call, the slowest rank's; bytes sent: by a rank, in a call")
    print("every rank's output is as exact as one device's" if all_fine else "an output is OFF: see the table")
    return 0 if all_fine else 1


def _measure(setting: Setting) -> tuple[list[list[Cell]], bool]:
    """A line for one process and for each strategy; and whether all are exact."""
    plan = setting.plan
    strategies = able_strategies(problem_of(plan, setting.shape), plan)
    with Progress(2 + len(strategies)) as progress:
        progress.step("one process, and the oracle in float64")
        expected, expected_lse, alone, alone_seconds = _single_process(setting)
        alone_rmse = relative_rmse(alone, expected)
        alone_bound = single_device_bound(setting.dtype, expected_lse)
        all_fine = alone_rmse <= alone_bound
        table = [_line("one process", _error(alone, expected), alone_rmse, alone_bound, all_fine, alone_seconds, "")]
        progress.step(f"starting {plan.cp_size} processes")
        with ProcessRanks(plan.cp_size) as ranks:
            for strategy in strategies:
                progress.step(f"strategy {strategy.name}")
                results = ranks.run(rank_program, setting, strategy.name)
                out, lse = _in_order(plan, results)
                error = relative_rmse(out, expected)
                results_merged = num_results(strategy.schedule(problem_of(plan, setting.shape), plan))
                bound = rmse_bound(alone_rmse, setting.dtype, results_merged, expected_lse)
                # The LSE is fp32 whatever the dtype, so its own bound is that of fp32 sums; absolute, as it may be near 0.
                lse_bound = rmse_bound(0.0, torch.float32, plan.cp_size + setting.shape.head_dim, expected_lse)
                fine = error <= bound and rmse(lse, expected_lse) <= lse_bound and all(result.restored for result in results)
                all_fine &= fine
                seconds, sent = max(result.seconds for result in results), max(result.bytes_sent for result in results)
                table.append(_line(strategy.name, _error(out, expected), error, bound, fine, seconds, f"{sent:,}"))
    return table, all_fine


def _line(name: str, largest: str, error: float, bound: float, fine: bool, seconds: float, sent: str) -> list[Cell]:
    verdict = Styled("yes", "green") if fine else Styled("NO", "bold red")
    return [name, largest, f"{error:.2e}", f"{bound:.2e}", verdict, f"{seconds * 1e3:.1f}", sent]


def rank_program(setting: Setting, strategy: str) -> RankResult:
    """What one rank does, in the middle of the default process group."""
    q, k, v, prefix = setting.tensors()
    meta = setting.plan.metadata(dist.get_rank())
    q_local, k_local, v_local = (cpattn.shard(x, meta) for x in (q, k, v))
    transport = as_transport(None, setting.plan.cp_size)

    def attend() -> tuple[Tensor, Tensor]:
        return cpattn.cp_attention(q_local, k_local, v_local, meta, kv_cache=prefix, strategy=strategy, return_lse=True, check=False)

    cpattn.cp_attention(q_local, k_local, v_local, meta, kv_cache=prefix, strategy=strategy, check=True)
    sent_before = transport.bytes_sent
    out, lse = attend()
    bytes_sent = transport.bytes_sent - sent_before
    seconds = _median_seconds(attend)
    # What a model does at its end: bring everything back into the original order, on every rank.
    restored = torch.equal(cpattn.unshard(q_local, meta), q)
    return RankResult(out, lse, seconds, bytes_sent, restored)


def _default_in_words() -> str:
    """Of a wheel there is no checkout to name a file of."""
    if _DEFAULT_BATCH.exists():
        return "examples/batches/mixed.json"
    return ", ".join(f"{prefix}+{extend}" for prefix, extend in _BUILT_IN_BATCH)


def _setting(options: argparse.Namespace) -> Setting:
    if options.batch is not None:
        batch = read_batch(options.batch)
    else:
        batch = read_batch(str(_DEFAULT_BATCH)) if _DEFAULT_BATCH.exists() else _BUILT_IN_BATCH
    if options.cp > 64:
        raise PlanError(f"--cp {shown(options.cp)} would start as many processes; the demo starts 64 at most")
    if not 0 <= options.seed + 2**63 < 2**64:
        raise CPError(f"--seed {shown(options.seed)}: it must fit into 64 bits")
    plan, shape = cpattn.plan(batch, options.cp), shape_from(options)
    numbers = (plan.num_tokens + plan.num_prefix_tokens) * (shape.heads + shape.kv_heads) * (shape.head_dim + shape.v_head_dim)
    if numbers > _MOST_NUMBERS or sum(plan.rank_pairs) * shape.heads > _MOST_SCORES:
        raise CPError(
            "this batch with these heads is too large for the demo, which computes it in float64 on the CPU; give it fewer tokens or "
            "heads (`cpattn plan` takes any)"
        )
    return Setting(plan, shape, options.seed)


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
