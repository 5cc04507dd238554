"""One rank of a serving engine that is driven at random: results are the oracle's, and pages what a plain model of the cache says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from references.cache_model import CacheForm, CacheModel, Tokens
from torch import Tensor

import cpattn
from cpattn.attention.backend import AttentionOptions
from cpattn.testing import oracle_attention, relative_rmse, rmse_bound, single_device_bound
from engines.cache_books import Books, EngineBooks, PoolBooks

HEADS, TOKENS, LONGEST, REQUESTS = 12, 3000, 90, 6


@dataclass(frozen=True)
class Loop:
    """One engine, and what it is asked for.

    Attributes:
        pool: whether a KVPool keeps the books, or the engine; known: whether cpattn is told which rank holds which token.
        queries: "rows", or "all", each rank's heads of all of them.
        bucket: whether all steps go through the same metadata, as CUDA graphs do.
    """

    seed: int
    number: int
    form: CacheForm
    pool: bool
    known: bool
    queries: str
    bucket: bool

    @property
    def kind(self) -> str:
        form = self.form
        owner = form.owner if isinstance(form.owner, str) else "striped"
        return f"{owner}, {'fp8' if form.scales else 'bf16'}, {'pool' if self.pool else 'engine'}"


class Step(NamedTuple):
    """A planned step: of each request its cached and its new tokens, in the order of the plan, and queries of all heads."""

    plan: cpattn.Plan
    cached: dict[str, list[int]]
    new: dict[str, list[int]]
    q: Tensor


class Inputs(NamedTuple):
    """Of one rank's call: q, k and v; its metadata; its pages."""

    new: tuple[Tensor, Tensor, Tensor | None]
    meta: cpattn.CPMetadata
    cache: cpattn.PagedKV


class Fault(Exception):
    """What an attention raises that is to fail."""


def _raise(q: Tensor, keys: cpattn.Keys, spans: cpattn.Spans, options: AttentionOptions, out_dtype: torch.dtype) -> NoReturn:
    raise Fault


def in_a_row(tokens: Mapping[str, Sequence[int]]) -> list[int]:
    """Request after request."""
    return [number for some in tokens.values() for number in some]


class Server:
    """One rank's engine; every rank draws the same steps."""

    def __init__(self, loop: Loop, group: cpattn.Transport) -> None:
        self.loop, self.form, self.group = loop, loop.form, group
        self.rng = np.random.default_rng([loop.seed, loop.number, 1])
        self.random = torch.Generator().manual_seed(int(self.rng.integers(2**31)))
        self.tokens = Tokens(loop.form, TOKENS, self.random)
        of_heads = self.tokens.of_heads
        self.books: Books = (
            PoolBooks(loop.form, group.rank, of_heads) if loop.pool else EngineBooks(loop.form, group.rank, of_heads, loop.known)
        )
        self.model = CacheModel(loop.form, group.rank, self.tokens.stored, self.books.pages)
        self.drafts: dict[str, int] = {}  # of each request its last tokens that may yet be rejected
        self.used = self.admitted = 0
        self.meta: cpattn.CPMetadata | None = None

    def run(self, steps: int) -> Counter[str]:
        """Counts of what was done."""
        done: Counter[str] = Counter()
        for step in range(steps):
            kind = self._kind()
            try:
                getattr(self, kind)()
                self.check()
            except cpattn.PoolFullError:
                kind = "release, as all was full"
                self.release()
            except Exception as error:
                raise AssertionError(f"step {step}, {kind}, of {self.loop}: {error}") from error
            done[kind] += 1
        return done

    def _kind(self) -> str:
        running = self.model.tokens
        if not running or self.used > TOKENS - REQUESTS * LONGEST:
            # No tokens are left to compute: what remains is to release requests.
            return "release" if running else "admit"
        weights = {
            "admit": 2 if len(running) < REQUESTS else 0,
            "chunk": 4,
            "decode": 4,
            "speculate": 3,
            "fork": 2,
            "release": 1,
            "fail": 1,
        }
        weights["reject"] = 12 if self.drafts else 0
        weights["fork"] *= len(running) < REQUESTS
        kinds = list(weights)
        return str(self.rng.choice(kinds, p=np.array([weights[kind] for kind in kinds]) / sum(weights.values())))

    def check(self) -> None:
        """Every page."""
        self.model.check({name: self.books.line(name) for name in self.model.tokens})

    def admit(self) -> str:
        name = self._new_name()
        self.books.admit(name)
        self.model.admit(name)
        return name

    def fork(self) -> None:
        parent, child = self._any(), self._new_name()
        length = int(self.rng.integers(len(self.model.tokens[parent]) + 1))
        self.books.fork(parent, child, length)
        self.model.admit(child, parent, length)

    def release(self) -> None:
        name = self._any()
        self.books.release(name)
        self.model.release(name)
        self.drafts.pop(name, None)

    def chunk(self) -> None:
        """A chunk of some prompts, beside requests that decode or wait."""
        names = self._some()
        self.compute({name: int(self.rng.choice([0, 1, 1, int(self.rng.integers(2, 31))])) for name in names[1:]} | {names[0]: 11})

    def decode(self) -> None:
        self.compute(dict.fromkeys(self._some(), 1))

    def speculate(self) -> None:
        """One token and 1 to 7 drafts, beside requests that decode."""
        step = self.compute({name: int(self.rng.choice([1, *range(2, 9)])) for name in self._some()})
        self.drafts = {name: len(new) - 1 for name, new in step.new.items() if len(new) > 1}

    def reject(self) -> None:
        """Some of the drafts are accepted; the next tokens take the places of the others."""
        for name, count in self.drafts.items():
            self.cut(name, int(self.rng.integers(count + 1)))
        self.drafts = {}

    def cut(self, name: str, count: int) -> None:
        """A request's last tokens are no part of it any more."""
        length = len(self.model.tokens[name]) - count
        self.books.reject(name, length)
        self.model.cut(name, length)

    def fail(self) -> None:
        """A step in which one rank raises in its attention. All take it back, so that others can follow."""
        step = self._plan({name: int(self.rng.choice([1, 9])) for name in self._some()})
        slots = self.model.slots_of_last(step.new, {name: self.books.line(name) for name in step.new})
        failing, strategy = int(self.rng.integers(self.form.cp_size)), str(self.rng.choice(self._strategies(step, None)[1:]))
        inputs, backend = self._inputs(step), cpattn.BACKENDS["reference" if self.form.device == "cpu" else "triton"]
        if self.group.rank == failing:
            backend = replace(backend, attend=_raise, accumulate=None)
        try:
            cpattn.cp_attention(*inputs.new, inputs.meta, kv_cache=inputs.cache, strategy=strategy, backend=backend, **self._shared)
        except Fault:
            assert self.group.rank == failing
        self.books.undo(step.plan, {name: len(new) for name, new in step.new.items()})
        for name in step.new:
            self.model.cut(name, len(step.cached[name]))
        (self.model.clear if self.loop.pool else self.model.accept)(slots)

    def compute(self, lengths: dict[str, int]) -> Step:
        """One layer of a step."""
        form, step = self.form, self._plan(lengths)
        longest = int(step.plan.total_lens.max())
        window = int(self.rng.integers(1, longest + 1)) if self.loop.known and longest and self.rng.random() < 0.3 else None
        k, v, prefix = self.tokens.meant_k, self.tokens.meant_v, in_a_row(step.cached)
        numbers, batch = in_a_row(step.new), step.plan.batch
        want, lse = oracle_attention(step.q, k[numbers], v[numbers], batch, prefix_k=k[prefix], prefix_v=v[prefix], window=window)
        bound = rmse_bound(single_device_bound(torch.bfloat16, lse), torch.bfloat16, form.cp_size + 1, lse)
        for out in self._attend(step, window):
            mine = want.chunk(form.cp_size, dim=1)[self.group.rank] if self.loop.queries == "all" else want
            error = relative_rmse(out[: step.plan.num_tokens], mine)
            assert error <= bound, f"error {error:.2e}, bound {bound:.2e}, window={window}"
        return step

    def _plan(self, lengths: dict[str, int]) -> Step:
        """Of requests in any order, which may have no more tokens than LONGEST."""
        names = [str(name) for name in self.rng.permutation(list(lengths))]
        cached = {name: list(self.model.tokens[name]) for name in names}
        extends = [(name, min(lengths[name], LONGEST - len(cached[name]))) for name in names]
        partition, pad_to = str(self.rng.choice(["zigzag", "contiguous", "whole"])), int(self.rng.choice([1, 4]))
        plan = self.books.plan(extends, queries=self.loop.queries, partition=partition, pad_to=pad_to)
        # Whoever goes on with drafts has accepted them.
        self.drafts = {name: count for name, count in self.drafts.items() if name not in lengths}
        new: dict[str, list[int]] = {}
        for name, extend in extends:
            new[name] = list(range(self.used, self.used + extend))
            self.used += extend
        self.model.extend(plan, new)
        q = torch.randn(plan.num_tokens, HEADS, self.form.head_dim, generator=self.random).bfloat16().to(self.form.device)
        return Step(plan, cached, new, q)

    def _inputs(self, step: Step) -> Inputs:
        """This rank's, with NaN where nobody is to look."""
        form, group = self.form, self.group
        meta, shape = self._metadata(step.plan)
        cache, numbers = self.books.cache(list(step.new), shape), in_a_row(step.new)
        q = step.q.chunk(form.cp_size, dim=1)[group.rank] if self.loop.queries == "all" else step.q
        q, k, v = (cpattn.shard(x, meta) for x in (q, self.tokens.k[numbers], self.tokens.v[numbers]))
        for x in (q, k, v):
            x[meta.num_tokens :] = torch.nan
        if self.loop.queries == "all":
            # What others hold is not looked at.
            others = cpattn.slot_mapping(meta, cache.page_table, form.page_size) < 0
            k[others], v[others] = torch.nan, torch.nan
        return Inputs((q, k, None if form.v_in_k else v), meta, cache)

    def _attend(self, step: Step, window: int | None) -> list[Tensor]:
        """The results of a call, or of its pieces; at times also of another call over what lies in the pages then."""
        (q, k, v), meta, cache = self._inputs(step)
        # Of those on a CPU one reads pages, and one is given a copy.
        plain = ["reference"] if window is not None or self.loop.bucket else ["reference", "cpu"]
        backend = str(self.rng.choice(plain if self.form.device == "cpu" else ["triton"]))
        outs, in_pieces = [], self.rng.random() < 0.2
        if in_pieces:
            self._write(k, v, meta, cache)
        else:
            strategy = str(self.rng.choice(self._strategies(step, window)))
            outs = [cpattn.cp_attention(q, k, v, meta, kv_cache=cache, strategy=strategy, backend=backend, window=window, **self._shared)]
        if in_pieces or self.rng.random() < 0.3:
            outs.append(cpattn.attend(q, cache, meta, backend=backend, window=window, **self._shared))
        return [cpattn.unshard(out, meta, group=self.group) for out in outs]

    @property
    def _shared(self) -> dict[str, Any]:
        return {"group": self.group, "v_dim": self.form.v_head_dim if self.form.v_in_k else None}

    def _write(self, k: Tensor, v: Tensor | None, meta: cpattn.CPMetadata, cache: cpattn.PagedKV) -> None:
        """What an engine does that writes its pages itself."""
        slots = cpattn.slot_mapping(meta, cache.page_table, self.form.page_size)
        if self.form.owner != "computed" and self.loop.queries == "rows":
            k, v = cpattn.gather_kv(k, v, meta, group=self.group)
        cpattn.write_kv(k, v, cache, slots)

    def _metadata(self, plan: cpattn.Plan) -> tuple[cpattn.CPMetadata, tuple[int, int] | None]:
        """This rank's, and the shape of a page table."""
        if not self.loop.bucket:
            return plan.metadata(self.group.rank, self.form.device), None
        rows = REQUESTS * 31 + 4
        if self.meta is None:
            bucket = cpattn.Bucket(REQUESTS, rows, 2 * REQUESTS, LONGEST)
            self.meta = plan.metadata(self.group.rank, self.form.device, bucket)
        else:
            self.meta.copy_(plan)
        # A request that keeps pages of drafts has no more of them than the longest.
        return self.meta, (REQUESTS, -(-LONGEST // self.form.page_size))

    def _strategies(self, step: Step, window: int | None) -> list[str]:
        """The choice among those that can serve a step, and those."""
        striped = isinstance(self.form.owner, cpattn.Striped)
        if self.loop.queries == "all":
            return ["auto", "helix"]
        if not self.form.sharded:
            return ["auto", "all_gather", "ring"]
        if window is not None:
            # A window as long as the longest request is none.
            reaches_all = window >= int(step.plan.total_lens.max()) and not self.loop.bucket
            return ["auto", "pass_q"] if reaches_all else ["auto", "pass_q", "all_gather"]
        if self.loop.bucket:
            return ["auto", "pass_q"] if striped else ["auto", "pass_q", "pass_q_ring"]
        return ["auto", "pass_q", "pass_q_ring", "ring"]

    def _any(self) -> str:
        return str(self.rng.choice(list(self.model.tokens)))

    def _some(self) -> list[str]:
        running = list(self.model.tokens)
        return [str(name) for name in self.rng.permutation(running)[: self.rng.integers(1, len(running) + 1)]]

    def _new_name(self) -> str:
        self.admitted += 1
        return f"r{self.admitted}"
