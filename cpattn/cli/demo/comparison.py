"""Each strategy over all ranks, and one device alone, against the float64 oracle."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import cpattn
from cpattn.cli.demo.place import Place
from cpattn.cli.demo.program import RankResult, attend_on_rank, median_seconds
from cpattn.cli.demo.setting import Setting
from cpattn.cli.progress import Progress
from cpattn.cli.traffic import problem_of
from cpattn.exchange.registry import able_strategies
from cpattn.exchange.schedule import num_results
from cpattn.testing import oracle_attention, relative_rmse, rmse, rmse_bound, single_device_bound


class Outcome(NamedTuple):
    """One line of the demo's table.

    Attributes:
        name: of the strategy, or what has no other ranks.
        largest: error of the output, and error: relative RMSE; bound: what that may be.
        fine: whether all is as exact as it must be.
        seconds: of a call, the slowest rank's.
        bytes_sent: by a rank, in a call; None where nothing is sent.
    """

    name: str
    backend: str
    largest: float
    error: float
    bound: float
    fine: bool
    seconds: float
    bytes_sent: int | None = None


def measure(setting: Setting, place: Place) -> Iterator[Outcome]:
    """One device alone, then each strategy."""
    problem = problem_of(setting.plan, setting.shape)
    strategies = able_strategies(problem, setting.plan)
    with Progress(2 + len(strategies)) as progress:
        progress.step("one device alone, and the oracle in float64")
        alone = _Alone(setting)
        yield alone.outcome
        progress.step(f"starting {place.cp_size} ranks")
        with place.ranks() as run:
            for strategy in strategies:
                progress.step(f"strategy {strategy.name}")
                results = run(attend_on_rank, setting, strategy.name)
                yield alone.compare(strategy.name, results, num_results(strategy.schedule(problem, setting.plan)))


class _Alone:
    """The oracle's output and LSE, and what one device makes of the batch without splitting it."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._q, self._k, self._v, self._prefix = setting.tensors()
        prefix, batch = self._prefix, setting.plan.batch
        expected = oracle_attention(self._q, self._k, self._v, batch, prefix_k=prefix.k, prefix_v=prefix.v)
        self._expected, self._lse = (x.cpu() for x in expected)
        self._meta = cpattn.build_metadata(batch, 1, 0, self._q.device)
        # By backend: a strategy that merges may be served by another one than "auto" takes for one device.
        self._errors: dict[str, float] = {}
        self.outcome = self._measure()

    def _measure(self) -> Outcome:
        backend = cpattn.prepare(self._q, self._k, self._v, self._meta, kv_cache=self._prefix).backend.name
        out = self._attend(backend).cpu()
        error, bound = relative_rmse(out, self._expected), single_device_bound(self._setting.dtype, self._lse)
        self._errors[backend] = error
        seconds = median_seconds(lambda: self._attend(backend), self._q.device)
        return Outcome("one device", backend, _largest(out, self._expected), error, bound, error <= bound, seconds)

    def _attend(self, backend: str) -> Tensor:
        return cpattn.cp_attention(self._q, self._k, self._v, self._meta, kv_cache=self._prefix, backend=backend)

    def _error_of(self, backend: str) -> float:
        if backend not in self._errors:
            self._errors[backend] = relative_rmse(self._attend(backend).cpu(), self._expected)
        return self._errors[backend]

    def compare(self, strategy: str, results: list[RankResult], merged: int) -> Outcome:
        """What all ranks together made of it, of so many partial results for each query."""
        setting, backend = self._setting, results[0].backend
        out, lse = in_order(setting.plan, results)
        error, own = relative_rmse(out, self._expected), self._error_of(backend)
        if merged > 1 and not cpattn.BACKENDS[backend].fp32_out:
            # Its partial results are rounded to half precision, and what they are merged to once more: two errors of that size.
            own *= 2**0.5
        bound = rmse_bound(own, setting.dtype, merged, self._lse)
        # The LSE is fp32 whatever the dtype, so its own bound is that of fp32 sums; absolute, as it may be near 0.
        lse_bound = rmse_bound(0.0, torch.float32, setting.plan.cp_size + setting.shape.head_dim, self._lse)
        fine = error <= bound and rmse(lse, self._lse) <= lse_bound and all(result.restored for result in results)
        seconds, sent = max(result.seconds for result in results), max(result.bytes_sent for result in results)
        return Outcome(strategy, backend, _largest(out, self._expected), error, bound, fine, seconds, sent)


def in_order(plan: cpattn.Plan, results: list[RankResult]) -> tuple[Tensor, Tensor]:
    """The ranks' rows put where their own metadata says, independently of unshard."""
    out = torch.full((plan.num_tokens, *results[0].out.shape[1:]), torch.nan, dtype=results[0].out.dtype)
    lse = torch.full((plan.num_tokens, *results[0].lse.shape[1:]), torch.nan)
    for rank, result in enumerate(results):
        meta = plan.metadata(rank)
        tokens = meta.token_index[: meta.num_tokens]
        out[tokens] = result.out[: meta.num_tokens]
        lse[tokens] = result.lse[: meta.num_tokens]
    return out, lse


def _largest(out: Tensor, expected: Tensor) -> float:
    return (out.double() - expected).abs().max().item() if len(out) else 0.0
