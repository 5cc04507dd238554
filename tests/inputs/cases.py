"""One attention problem over a ragged batch: its tensors, the oracle's answer, and cpattn's at any cp_size."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import cpattn
from cpattn.call.arguments import StrategyChoice
from cpattn.exchange.head_shares import head_shares
from cpattn.exchange.registry import find_strategy
from cpattn.exchange.schedule import num_results
from cpattn.problem import Problem
from cpattn.testing import oracle_attention, relative_rmse, rmse, rmse_bound, run_loopback, single_device_bound
from cpattn.transports.groups import Group
from inputs.paged_caches import RankPages, random_ranks, random_shards

# Each strategy with the caches that it serves.
EXCHANGES = [
    ("all_gather", "packed"),
    ("all_gather", "paged"),
    ("ring", "packed"),
    ("ring", "paged"),
    ("ring", "sharded"),
    ("pass_q", "packed"),
    ("pass_q", "sharded"),
    ("pass_q_ring", "packed"),
    ("pass_q_ring", "sharded"),
]
# Those that divide heads, whose caches may have a rank's own heads alone.
HEAD_EXCHANGES = [("ulysses", "packed"), ("ulysses", "own packed"), ("ulysses", "own pages")]
PACKED = ("packed", "own packed")
STRIPED_EXCHANGES = [("ring", "striped"), ("pass_q", "striped"), ("pass_q_ring", "striped")]


@dataclass
class AttentionCase:
    """Random tensors for a batch. Everything follows from the fields, so that a failing case can be written down."""

    batch: list[tuple[int, int]]
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    v_head_dim: int | None = None
    dtype: torch.dtype = torch.float32
    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    seed: int = 0
    device: str = "cpu"
    overlap: int | None = None
    # Or "paged"; or "sharded", pages of which each rank holds its own tokens alone; or "ranked", where the plan knows which those are;
    # or "striped", those of its positions. "own packed" and "own pages" have a rank's own KV heads alone, divided among so many ranks
    # that follow each other, or among all.
    cache: str = "packed"
    within: int | None = None
    page_size: int = 16
    interleave: int = 1
    v_in_k: bool = False
    options: dict[str, object] = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        tokens = sum(extend for _, extend in self.batch)
        cached = sum(prefix for prefix, _ in self.batch)
        v_head_dim = self.v_head_dim or self.head_dim

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(self.device, self.dtype)

        self.q = normal(tokens, self.heads, self.head_dim)
        self.k = normal(tokens, self.kv_heads, self.head_dim)
        self.v = self.k[..., :v_head_dim] if self.v_in_k else normal(tokens, self.kv_heads, v_head_dim)
        self.prefix_k = normal(cached, self.kv_heads, self.head_dim)
        self.prefix_v = self.prefix_k[..., :v_head_dim] if self.v_in_k else normal(cached, self.kv_heads, v_head_dim)
        sinks = (torch.randn(self.heads, generator=generator) * 2).to(self.device) if self.sinks else None
        self.options = {"scale": self.scale, "window": self.window, "softcap": self.softcap, "sinks": sinks}

    def __getstate__(self) -> dict[str, Any]:
        """Through the CPU: the process that is sent the case has a GPU of its own."""
        return {name: _moved(value, "cpu") for name, value in vars(self).items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({name: _moved(value, state["device"]) for name, value in state.items()})

    @cached_property
    def expected(self) -> tuple[Tensor, Tensor]:
        """Output and LSE of the oracle, float64."""
        return oracle_attention(self.q, self.k, self.v, self.batch, prefix_k=self.prefix_k, prefix_v=self.prefix_v, **self.options)  # type: ignore[arg-type]

    @property
    def prefix(self) -> cpattn.PackedKV:
        """The prefix as every rank has it."""
        return cpattn.PackedKV(self.prefix_k, None if self.v_in_k else self.prefix_v)

    def cached_heads(self, plan: cpattn.Plan, rank: int) -> slice:
        """The KV heads that a rank's cache has."""
        size = self.within or plan.cp_size
        return head_shares(self.heads, self.kv_heads, size)[rank % size].kv if self.cache.startswith("own ") else slice(None)

    def packed(self, plan: cpattn.Plan, rank: int) -> cpattn.PackedKV:
        """The prefix as a rank has it."""
        heads, (k, v) = self.cached_heads(plan, rank), (self.prefix.k, self.prefix.v)
        return cpattn.PackedKV(k[:, heads], None if v is None else v[:, heads])

    def plan(self, cp_size: int, **options: Any) -> cpattn.Plan:
        """A plan of the batch, with its prefixes spread at random where the cache is sharded."""
        if self.cache == "sharded":
            options["prefix_shards"] = random_shards(self.batch, cp_size, self.seed)
        if self.cache == "ranked":
            options["prefix_ranks"] = random_ranks(self.batch, cp_size, self.seed)
        if self.cache == "striped":
            options["owner"] = cpattn.Striped(self.interleave)
        return cpattn.plan(self.batch, cp_size, **options)

    def problem(self, plan: cpattn.Plan) -> Problem:
        """What its calls ask for."""
        return Problem(
            torch.device(self.device),
            self.dtype,
            rows=plan.rows,
            q_heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            v_head_dim=self.v.shape[2],
            v_in_k=self.v_in_k,
            cache="packed" if self.cache in PACKED else "paged",
            window=self.window,
            own_heads=self.cache.startswith("own "),
        )

    def pages(self, plan: cpattn.Plan, rank: int, **options: Any) -> RankPages:
        """A rank's pages, with the prefix in them."""
        heads = self.cached_heads(plan, rank)
        new_v, prefix_v = (None, None) if self.v_in_k else (self.v[:, heads], self.prefix_v[:, heads])
        return RankPages(plan, rank, self.prefix_k[:, heads], prefix_v, self.k[:, heads], new_v, self.page_size, self.seed, **options)

    def on_rank(
        self,
        plan: cpattn.Plan,
        rank: int,
        communicator: Group,
        strategy: StrategyChoice,
        backend: Any,
        check: bool = False,
        meta: cpattn.CPMetadata | None = None,
    ) -> tuple[Tensor, Tensor]:
        """This rank's call, its padding full of NaN; what it returns for padding is checked and cut off.

        The metadata are made anew, unless there are some to reuse.
        """
        meta = plan.metadata(rank, self.device) if meta is None else meta
        q, k, v = (cpattn.shard(x, meta) for x in (self.q, self.k, self.v))
        for x in (q, k, v):
            x[meta.num_tokens :] = torch.nan
        before = [x.clone() for x in (q, k, v)]
        max_requests = meta.bucket.max_requests if meta.bucket else None
        pages = None if self.cache in PACKED else self.pages(plan, rank, max_requests=max_requests)
        cache = self.packed(plan, rank) if pages is None else pages.cache

        def call(q: Tensor, k: Tensor, v: Tensor, cache: cpattn.PackedKV | cpattn.PagedKV) -> Any:
            return cpattn.cp_attention(
                q,
                k,
                None if self.v_in_k else v,
                meta,
                group=communicator,
                v_dim=v.shape[2] if self.v_in_k else None,
                kv_cache=cache,
                strategy=strategy,
                backend=backend,
                return_lse=True,
                check=check,
                overlap=self.overlap,
                **self.options,
            )  # type: ignore[call-overload, misc]

        if isinstance(backend, str) and q.is_cuda:
            # Layers before this one, as what the second launches may be launched again.
            for _ in range(2):
                call(-q, 1 - k, v * 2, _other_prefixes(cache))
        out, lse = call(q, k, v, cache)
        assert all(torch.equal(x, y) or torch.equal(x.isnan(), y.isnan()) for x, y in zip((q, k, v), before, strict=True))
        if pages is not None:
            pages.check_written()
        assert out.dtype == self.dtype
        assert lse.dtype == torch.float32
        assert out.shape == (meta.rows, self.heads, self.v.shape[2])
        assert lse.shape == (meta.rows, self.heads)
        assert (out[meta.num_tokens :] == 0).all()
        assert (lse[meta.num_tokens :] == -torch.inf).all()
        # In a bucket rows of zeros follow the tokens.
        whole, whole_lse = (cpattn.unshard(x, meta, group=communicator) for x in (out, lse))
        return whole[: plan.num_tokens], whole_lse[: plan.num_tokens]

    def single_device_rmse(self, backend: str) -> tuple[float, float]:
        """The backend's own error with all tokens on one device: of the output, and of the LSE."""
        alone = replace(self, cache="packed")
        alone.q, alone.k, alone.v, alone.prefix_k, alone.prefix_v = self.q, self.k, self.v, self.prefix_k, self.prefix_v
        alone.options = self.options
        return self._rmse(alone.on_rank(cpattn.plan(self.batch, 1), 0, None, "all_gather", backend))

    def check(
        self,
        outputs: list[tuple[Tensor, Tensor]],
        plan: cpattn.Plan,
        strategy: StrategyChoice,
        backend: str,
        rounded_partials: bool = False,
    ) -> float:
        """Every rank's unsharded output and LSE: the same on all, and within the bound of the backend's own error. Returns
        the larger of both errors over its bound.

        Where a backend can only give partial results in half precision, these carry its own error each and the merged
        result is rounded once more: two errors of that size, which are independent.
        """
        for out, lse in outputs[1:]:
            assert torch.equal(out, outputs[0][0])
            assert torch.equal(lse, outputs[0][1])
        steps = num_results(find_strategy(strategy).schedule(self.problem(plan), plan))
        own, own_lse = self.single_device_rmse(backend)
        # The baseline runs the same code, so a mistake that both make would raise the bound: it has a bound of its own.
        lse = self.expected[1]
        # q and k are normal, so that q . k is of size sqrt(D), and seldom more than three times that.
        score_size = 3 * (1.0 if self.scale is None else self.scale * self.q.shape[2] ** 0.5)
        # Beside a large sink an output may be so small that fp16 holds it to a multiple of 6e-8 only.
        smallest = torch.finfo(self.dtype).smallest_normal * torch.finfo(self.dtype).eps
        size = rmse(self.expected[0], torch.zeros_like(self.expected[0]))
        grain = smallest / size if size else 0.0
        assert own <= single_device_bound(self.dtype, lse, score_size) + grain, own
        # A score is a sum of head_dim products.
        unit_roundoff = torch.finfo(torch.float32).eps / 2
        assert own_lse <= single_device_bound(torch.float32, lse, score_size) + self.q.shape[2] * unit_roundoff, own_lse
        own *= 2**0.5 if rounded_partials else 1.0
        error, error_lse = self._rmse(outputs[0])
        bound, bound_lse = (
            rmse_bound(own, self.dtype, steps, lse, score_size) + grain,
            rmse_bound(own_lse, torch.float32, steps, lse, score_size),
        )
        assert error <= bound, (error, own)
        assert error_lse <= bound_lse, (error_lse, own_lse)
        return max(error / bound, error_lse / bound_lse)

    def check_loopback(self, plan: cpattn.Plan, strategy: StrategyChoice, backend: str, rounded_partials: bool = False) -> None:
        """Runs all ranks in threads and checks them."""
        outputs = run_loopback(lambda c: self.on_rank(plan, c.rank, c, strategy, backend), plan.cp_size)
        self.check(outputs, plan, strategy, backend, rounded_partials)

    def _rmse(self, output: tuple[Tensor, Tensor]) -> tuple[float, float]:
        """Of the output relative to its size; of the LSE as it is, since its size says nothing: it may be near 0."""
        return relative_rmse(output[0], self.expected[0]), rmse(output[1], self.expected[1])


def _other_prefixes(cache: cpattn.PackedKV | cpattn.PagedKV) -> cpattn.PackedKV | cpattn.PagedKV:
    """Of another layer; pages are written again."""
    if isinstance(cache, cpattn.PagedKV):
        return cache
    k = 2 - cache.k
    return cpattn.PackedKV(k, None if cache.v is None else -cache.v)


def _moved(value: Any, device: str) -> Any:
    """The value with the tensors in it on a device; ``"cuda"`` is the current one."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_moved(x, device) for x in value)
    return {key: _moved(x, device) for key, x in value.items()} if isinstance(value, dict) else value
