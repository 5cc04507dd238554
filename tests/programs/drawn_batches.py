"""Random batches, and what is done with each: every strategy with every cache and owner rule that it serves, over every partition."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from inputs.cases import EXCHANGES, HEAD_EXCHANGES, PACKED, STRIPED_EXCHANGES, AttentionCase
from inputs.own_partitions import OwnPartition
from inputs.stored_cases import StoredCase
from torch import Tensor

import cpattn
from cpattn.call.arguments import StrategyChoice
from cpattn.exchange.registry import find_strategy
from programs import split_heads
from programs.failed_calls import Faults, attend_with_faults, check_partly_failed, with_fault
from programs.fault_injection import Injected

# A fault is at a line of the call; calls have some hundreds.
LINES = 500
PARTITIONS = ("zigzag", "contiguous", "whole", "uncut", "auto", "own")
SIZES = (1, 2, 3, 4, 5, 7)


class Kind(NamedTuple):
    """A strategy and what it serves.

    Attributes:
        strategy: its name; "hybrid ring" and "hybrid all_gather" are of groups of any size that divides the ranks.
        cache: as :class:`AttentionCase` has it.
        window: whether some request is longer than a window, without which it is another strategy's; None if that makes no difference.
        stored: the dtype of pages and what their scales belong to; None for those of q.
    """

    strategy: str
    cache: str
    window: bool | None = None
    stored: tuple[torch.dtype, str | None] | None = None

    def __str__(self) -> str:
        words = [self.strategy, self.cache, *["window"] * bool(self.window)]
        if self.stored is not None:
            dtype, scales = self.stored
            words += [str(dtype).removeprefix("torch."), *([] if scales is None else [f"scales: {scales}"])]
        return ", ".join(words)


_OVER_SHARDS = [(strategy, "ranked") for strategy in ("ring", "pass_q", "pass_q_ring")]
_OVER_SHARDED = [("all_gather", "striped"), ("all_gather", "ranked"), ("pass_q", "striped"), ("pass_q", "ranked")]
_SCALES = ("one", "head", "token")
# Pages in fp8 with each kind of scales, and in half precision beside other queries.
_STORED = [*((torch.float8_e4m3fn, scales) for scales in _SCALES), (torch.float8_e5m2, "token"), (torch.bfloat16, None)]
_IN_Q_DTYPE = [
    *(Kind(*exchange) for exchange in (*EXCHANGES, *STRIPED_EXCHANGES, *_OVER_SHARDS, *HEAD_EXCHANGES)),
    *(Kind(*exchange, window=True) for exchange in _OVER_SHARDED),
    *(Kind(f"hybrid {across}", cache) for across in ("ring", "all_gather") for cache in (*(cache for _, cache in HEAD_EXCHANGES), "paged")),
    *(Kind("two_level", cache) for cache in ("packed", "paged")),
    *(Kind("helix", cache) for cache in ("striped", "sharded", "ranked")),
]
_TAKE_STORED = ("all_gather", "ring", "pass_q", "pass_q_ring", "two_level", "helix")
_IN_OTHER_DTYPES = [
    kind._replace(stored=stored)
    for kind in _IN_Q_DTYPE
    if kind.strategy in _TAKE_STORED and kind.cache not in PACKED
    for stored in _STORED
]  # fmt: skip
KINDS = [*_IN_Q_DTYPE, *_IN_OTHER_DTYPES]
# Of the former so many among all.
_Q_DTYPE_PART = 0.65


@dataclass
class Drawn:
    """One batch and what is done with it.

    Attributes:
        partition: of PARTITIONS.
        bucket: whether it is put into metadata that other batches could have, too.
    """

    number: int
    kind: Kind
    case: AttentionCase
    cp_size: int
    partition: str
    options: dict[str, Any]
    strategy: StrategyChoice
    backend: str
    faults: Faults | None
    bucket: bool

    @cached_property
    def plan(self) -> cpattn.Plan:
        return self.case.plan(self.cp_size, **self.options)

    @cached_property
    def meant(self) -> AttentionCase:
        """What a right call computes."""
        return self.case.dequantised() if isinstance(self.case, StoredCase) else self.case

    def run(self, group: cpattn.Transport) -> tuple[Any, Any]:
        """What a rank has of it with its faults, None where it raised or there are none, and then without."""
        failed = None
        if self.faults:
            failed = self._with_faults(group, self.faults)
        meta = self.plan.metadata(group.rank, bucket=self._bucket() if self.bucket else None)
        if self.kind.strategy == "helix":
            return failed, split_heads.call(self.case, meta, group, backend=self.backend)
        return failed, self.case.on_rank(self.plan, group.rank, group, self.strategy, self.backend, meta=meta)

    def check(self, results: list[tuple[Any, Any]]) -> float:
        """Of all ranks. Returns the error over its bound."""
        if self.faults and self.kind.strategy == "helix":
            self._check_failed_heads([failed for failed, _ in results])
        elif self.faults:
            # What is passed on for others arrives whoever fails.
            as_strategy = "all_gather" if self.kind.strategy == "two_level" else self.strategy
            check_partly_failed(self.meant, self.plan, as_strategy, [failed for failed, _ in results])
        outputs = [whole for _, whole in results]
        if self.kind.strategy == "helix":
            out, lse = (torch.cat(parts, dim=1) for parts in zip(*outputs, strict=True))
            outputs = [(out, lse)]
        return self.meant.check(outputs, self.plan, self.strategy, self.backend)

    def _with_faults(self, group: cpattn.Transport, faults: Faults) -> Any:
        if self.kind.strategy != "helix":
            return attend_with_faults(self.case, self.plan, group, group.rank, self.strategy, self.backend, faults)
        meta = self.plan.metadata(group.rank)
        return with_fault(lambda: split_heads.call(self.case, meta, group, backend=self.backend), group.rank, faults)

    def _check_failed_heads(self, results: list[tuple[Tensor, Tensor] | None]) -> None:
        """Each rank's heads: right, or NaN with LSE NaN, in whole rows."""
        size = 0.02 if self.case.dtype.itemsize == 2 else 1e-4
        for rank, result in enumerate(results):
            if result is None:
                continue
            for x, right in zip(result, self.meant.expected, strict=True):
                mine = right.chunk(self.cp_size, dim=1)[rank]
                assert torch.allclose(torch.where(x.isnan(), mine, x.double()), mine, rtol=size, atol=size), "what is not NaN is right"
            assert torch.equal(result[0].isnan().all(dim=-1), result[1].isnan()), "NaN in the result and in its LSE go together"

    def _bucket(self) -> cpattn.Bucket:
        """With room for more than the batch has."""
        plan = self.plan
        longest = int(plan.total_lens.max(initial=0))
        return cpattn.Bucket(len(plan.batch) + 1, plan.rows + 3, max(plan.rank_chunks, default=0) + 2, longest + 5)

    def fits_a_bucket(self) -> bool:
        """Whether what it asks for can be asked for with one."""
        # Packed prefixes have no fixed size, nor have copies of pages that a backend cannot read.
        if self.plan.num_prefix_tokens if self.case.cache in PACKED else self.backend != "reference":
            return False
        fixed = replace(self.case.problem(self.plan), fixed=True, rows=self._bucket().max_rows)
        return find_strategy(self.strategy).refusal(fixed, self.plan) is None


def run_all(batches: list[Drawn]) -> list[tuple[Any, Any]]:
    """One rank's part of each, over the default group."""
    return [drawn.run(cpattn.transport()) for drawn in batches]


def draw(seed: int, number: int, cp_size: int | None = None) -> Drawn:
    """A batch, alike for the same numbers."""
    rng = np.random.default_rng([seed, number])
    batch, kinds = _batch(rng), _IN_Q_DTYPE if rng.random() < _Q_DTYPE_PART else _IN_OTHER_DTYPES
    kind = kinds[rng.integers(len(kinds))]
    cp_size = int(rng.choice(SIZES)) if cp_size is None else cp_size
    divisors = [n for n in range(1, cp_size + 1) if cp_size % n == 0]
    within = int(rng.choice(divisors))
    kv_heads, backend = int(rng.choice([1, 2, 4])), str(rng.choice(["reference", "cpu"]))
    is_split = kind.strategy == "ulysses" or kind.strategy.startswith("hybrid")
    if kind.strategy.startswith("hybrid") and kind.cache == "paged" and within > 1:
        # Where every rank of a group has all KV heads.
        kv_heads = 1
    heads = 8 if is_split else 4
    if kind.strategy == "helix":
        heads, kv_heads = 2 * cp_size, min(kv_heads, 2)
    longest = max((sum(request) for request in batch), default=0)
    window = None
    if kind.window:
        if longest < 2:
            kind, window = kind._replace(window=None, strategy="pass_q"), None
        else:
            backend, window = "reference", int(rng.integers(1, longest))
    elif rng.random() < 0.3 and (kind.cache in (*PACKED, "paged", "own pages") or kind[:2] in (("helix", "striped"), ("helix", "ranked"))):
        window = int(rng.integers(1, 100))
    is_reference = backend == "reference"
    v_in_k = bool(rng.random() < 0.1)
    fields: dict[str, Any] = {
        "batch": batch,
        "heads": heads,
        "kv_heads": kv_heads,
        "v_head_dim": int(rng.choice([8, 16])) if v_in_k or rng.random() < 0.3 else None,
        "dtype": torch.float32 if rng.random() < 0.8 else torch.bfloat16,
        "scale": float(rng.choice([0.05, 1.0])) if rng.random() < 0.2 else None,
        "window": window if is_reference else None,
        "softcap": 3.0 if is_reference and rng.random() < 0.2 else None,
        "sinks": bool(rng.random() < 0.3),
        "seed": number,
        "overlap": int(rng.choice([n for n in (1, 2, 4) if kv_heads % n == 0])) if kind[:2] in _OVERLAPPED else None,
        "cache": kind.cache,
        "within": within if kind.strategy.startswith("hybrid") else None,
        "page_size": int(rng.choice([1, 3, 16])),
        "interleave": int(rng.choice([1, 2, 3, 16])),
        "v_in_k": v_in_k,
    }
    if kind.stored is None:
        case = AttentionCase(**fields)
    else:
        stored, scales = kind.stored
        if stored == torch.bfloat16:
            fields["dtype"] = torch.float32 if rng.random() < 0.5 else torch.float16
        case = StoredCase(**fields, stored=stored, scales=scales)
    partition = str(rng.choice(PARTITIONS))
    options: dict[str, Any] = {
        "partition": OwnPartition(number) if partition == "own" else partition,
        "pad_to": int(rng.choice([1, 1, 4, 16])),
    }
    if partition == "auto" and rng.random() < 0.5:
        options["token_cost"] = int(rng.choice([0, 100, 10**5]))
    if kind.strategy == "helix":
        options["queries"] = "all"
    strategy: StrategyChoice = kind.strategy
    if kind.strategy.startswith("hybrid"):
        strategy = cpattn.hybrid(within, kind.strategy.removeprefix("hybrid "))
    elif kind.strategy == "two_level":
        strategy = cpattn.two_level(within)
    faults = None
    if rng.random() < 0.3:
        failing = rng.permutation(cp_size)[: rng.choice([1, 1, cp_size])]
        error = [Injected, Injected, MemoryError, KeyboardInterrupt][rng.integers(4)]
        faults = Faults({int(rank): int(rng.integers(LINES)) for rank in failing}, error)
        if kind.strategy == "helix":
            # Padding of a rank that gets NaN is NaN.
            options["pad_to"] = 1
    drawn = Drawn(number, kind, case, cp_size, partition, options, strategy, backend, faults, bucket=False)
    drawn.bucket = bool(rng.random() < 0.3) and drawn.fits_a_bucket()
    return drawn


_OVERLAPPED = (("all_gather", "packed"), ("all_gather", "paged"))


def _batch(rng: np.random.Generator) -> list[tuple[int, int]]:
    """Mixed; or decoded, speculated, or one long request beside short ones."""

    def length(zero: float, most: int) -> int:
        return 0 if rng.random() < zero else int(rng.choice([1, 2, int(rng.integers(1, 12)), int(rng.integers(1, most))]))

    many = int(rng.integers(0, 7))
    shape = rng.choice(["mixed", "mixed", "decoded", "speculated", "one long"])
    if shape == "decoded":
        return [(length(0.1, 90), 1) for _ in range(many)]
    if shape == "speculated":
        # As many of each request, of which some have less room; and now and then a prefill among them.
        speculated = int(rng.integers(2, 6))
        extends = [speculated if rng.random() < 0.8 else int(rng.integers(0, speculated + 1)) for _ in range(many)]
        return [(length(0.1, 90), length(0.0, 60) if rng.random() < 0.1 else extend) for extend in extends]
    if shape == "one long":
        return [*((length(0.5, 30), length(0.1, 12)) for _ in range(many)), (length(0.5, 90), int(rng.integers(60, 200)))]
    return [(length(0.4, 90), length(0.15, 90)) for _ in range(many)]
