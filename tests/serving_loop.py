"""Random steps of serving loops over every kind of cache: each step's result is the float64 oracle's, and every page is compared after it.

python tests/serving_loop.py --steps 10000
python tests/serving_loop.py --steps 500 --processes

A loop is one engine that admits requests, computes chunks of their prompts, decodes, lets drafts be computed, accepts some of these,
forks and releases. All of it follows from the seed and the loop's number: ``--seed S --only N`` runs a loop again. Its ranks are
threads, or processes over gloo, and each does everything that every rank of an engine does.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from cache_books import Books, EngineBooks, PoolBooks
from cache_model import CacheForm, CacheModel, Tokens

import cpattn
from cpattn.testing import ProcessRanks, oracle_attention, relative_rmse, rmse_bound, run_loopback, single_device_bound

STEPS, TOKENS, LONGEST, REQUESTS, PROCESSES = 40, 3000, 90, 6, 3
HEADS = 12
E4M3, E5M2, BF16 = torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16


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


def draw(seed: int, number: int, cp_size: int | None = None, device: str = "cpu") -> Loop:
    """A loop, alike for the same numbers."""
    rng = np.random.default_rng([seed, number])
    # Each owner and dtype in turn, so that few loops have them all.
    owner: Any = ["striped", "computed", "replicated"][number % 3]
    is_fp8, pool = bool(number // 3 % 2), bool(rng.random() < 0.5)
    if owner == "striped":
        owner = cpattn.Striped(int(rng.choice([1, 1, 2, 3, 16])))
    # On a GPU of what kernels are made for.
    head_dim = 16 if device == "cpu" else 64
    v_in_k, page_size = bool(rng.random() < 0.2), int(rng.choice([1, 3, 4, 16]))
    drawn_size = int(rng.choice([1, 2, 3, 4]))
    form = CacheForm(
        cp_size=drawn_size if cp_size is None else cp_size,
        owner=owner,
        # From what three of the longest requests take on one rank, to plenty.
        num_pages=-(-LONGEST * int(rng.choice([3, 10])) // page_size),
        page_size=page_size,
        kv_heads=int(rng.choice([1, 2, 4])),
        head_dim=head_dim,
        v_head_dim=int(rng.choice([head_dim // 2, head_dim])),
        v_in_k=v_in_k,
        stored=[E4M3, E5M2][rng.integers(2)] if is_fp8 else BF16,
        scales=str(rng.choice(["token", "head"])) if is_fp8 else None,
        device=device,
    )
    known = pool or bool(rng.random() < 0.7)
    queries = "all" if form.sharded and rng.random() < 0.3 else "rows"
    return Loop(seed, number, form, pool, known, queries, bool(rng.random() < 0.3))


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
        weights = {"admit": 2 if len(running) < REQUESTS else 0, "chunk": 4, "decode": 4, "speculate": 3, "fork": 2, "release": 1}
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
        lengths = {name: int(self.rng.choice([1, *range(2, 9)])) for name in self._some()}
        self.compute(lengths)
        self.drafts = {name: count - 1 for name, count in lengths.items() if count > 1 and name in self.model.tokens}

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

    def compute(self, lengths: dict[str, int]) -> None:
        """One layer of a step."""
        form, loop = self.form, self.loop
        names = [str(name) for name in self.rng.permutation(list(lengths))]
        cached = {name: list(self.model.tokens[name]) for name in names}
        extends = [(name, min(lengths[name], LONGEST - len(cached[name]))) for name in names]
        options: dict[str, Any] = {
            "partition": str(self.rng.choice(["zigzag", "contiguous", "whole"])),
            "pad_to": int(self.rng.choice([1, 4])),
        }
        plan = self.books.plan(extends, queries=loop.queries, **options)
        # Whoever goes on with drafts has accepted them.
        self.drafts = {name: count for name, count in self.drafts.items() if name not in lengths}
        new: dict[str, list[int]] = {}
        for name, extend in extends:
            new[name] = list(range(self.used, self.used + extend))
            self.used += extend
        self.model.extend(plan, new)
        numbers, prefix = ([number for some in of.values() for number in some] for of in (new, cached))
        q = torch.randn(plan.num_tokens, HEADS, form.head_dim, generator=self.random).bfloat16().to(form.device)
        longest = max(len(cached[name]) + len(new[name]) for name in names)
        window = int(self.rng.integers(1, longest + 1)) if loop.known and longest and self.rng.random() < 0.3 else None
        k, v = self.tokens.meant_k, self.tokens.meant_v
        want, lse = oracle_attention(q, k[numbers], v[numbers], plan.batch, prefix_k=k[prefix], prefix_v=v[prefix], window=window)
        bound = rmse_bound(single_device_bound(torch.bfloat16, lse), torch.bfloat16, form.cp_size + 1, lse)
        for out in self._attend(plan, names, q, numbers, window):
            mine = want.chunk(form.cp_size, dim=1)[self.group.rank] if loop.queries == "all" else want
            error = relative_rmse(out[: plan.num_tokens], mine)
            assert error <= bound, f"error {error:.2e}, bound {bound:.2e}, window={window}"

    def _attend(self, plan: cpattn.Plan, names: list[str], q: torch.Tensor, numbers: list[int], window: int | None) -> list[torch.Tensor]:
        """The results of a call, or of its pieces; at times also of another call over what lies in the pages then."""
        form, group = self.form, self.group
        meta, shape = self._metadata(plan)
        cache = self.books.cache(names, shape)
        if self.loop.queries == "all":
            q = q.chunk(form.cp_size, dim=1)[group.rank]
        q, k, v = (cpattn.shard(x, meta) for x in (q, self.tokens.k[numbers], self.tokens.v[numbers]))
        for x in (q, k, v):
            x[meta.num_tokens :] = torch.nan
        if self.loop.queries == "all":
            # What others hold is not looked at.
            others = cpattn.slot_mapping(meta, cache.page_table, form.page_size) < 0
            k[others], v[others] = torch.nan, torch.nan
        v_dim = form.v_head_dim if form.v_in_k else None
        # Of those on a CPU one reads pages, and one is given a copy.
        plain = ["reference"] if window is not None or self.loop.bucket else ["reference", "cpu"]
        backend = str(self.rng.choice(plain if form.device == "cpu" else ["triton"]))
        shared: dict[str, Any] = {"group": group, "backend": backend, "window": window, "v_dim": v_dim}
        new_v, outs = None if form.v_in_k else v, []
        in_pieces = self.rng.random() < 0.2
        if in_pieces:
            self._write(k, new_v, meta, cache)
        else:
            strategy = str(self.rng.choice(self._strategies(plan, window)))
            outs = [cpattn.cp_attention(q, k, new_v, meta, kv_cache=cache, strategy=strategy, **shared)]
        if in_pieces or self.rng.random() < 0.3:
            outs.append(cpattn.attend(q, cache, meta, **shared))
        return [cpattn.unshard(out, meta, group=group) for out in outs]

    def _write(self, k: torch.Tensor, v: torch.Tensor | None, meta: cpattn.CPMetadata, cache: cpattn.PagedKV) -> None:
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

    def _strategies(self, plan: cpattn.Plan, window: int | None) -> list[str]:
        """Those that can serve a step, and the choice among them."""
        striped = isinstance(self.form.owner, cpattn.Striped)
        if self.loop.queries == "all":
            return ["auto"]
        if not self.form.sharded:
            return ["auto", "all_gather", "ring"]
        if window is not None:
            # A window as long as the longest request is none.
            reaches_all = window >= int(plan.total_lens.max()) and not self.loop.bucket
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


def serve(loop: Loop, steps: int) -> Counter[str]:
    """What each process of a group runs."""
    return Server(loop, cpattn.transport()).run(steps)


def serve_on_loopback(loop: Loop, steps: int = STEPS) -> Counter[str]:
    """All ranks as threads; what was done, by kind of step."""
    return run_loopback(lambda group: Server(loop, group).run(steps), loop.form.cp_size)[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--only", type=int, help="one loop of that seed")
    parser.add_argument("--device", default="cpu", help="or cuda, whose ranks are threads")
    parser.add_argument("--processes", action="store_true", help=f"{PROCESSES} processes over gloo in the place of threads")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"seed {given.seed}", flush=True)
    kinds, caches, number, said = Counter[str](), Counter[str](), given.only or 0, time.monotonic()
    ranks = ProcessRanks(PROCESSES) if given.processes else None
    try:
        while kinds.total() < given.steps:
            loop = draw(given.seed, number, PROCESSES if ranks else None, given.device)
            steps = min(STEPS, given.steps - kinds.total())
            done = ranks.run(serve, loop, steps)[0] if ranks else serve_on_loopback(loop, steps)
            kinds += done
            caches[loop.kind] += steps
            number += 1
            if given.only is not None:
                break
            if time.monotonic() - said > 30:
                said = time.monotonic()
                print(f"{kinds.total():,} steps of {number:,} loops", flush=True)
    except BaseException:
        print(f"failed in loop {number} of seed {given.seed}, after {kinds.total():,} steps", flush=True)
        raise
    finally:
        if ranks is not None:
            ranks.close()
    print(f"all right: {kinds.total():,} steps of {number:,} loops over {'gloo' if ranks else 'loopback'}; seed {given.seed}")
    for counts in (kinds, caches):
        print("; ".join(f"{what}: {count:,}" for what, count in sorted(counts.items())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
