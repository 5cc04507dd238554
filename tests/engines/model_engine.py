"""A small engine over KVPools, beside a plain model of what its cache must hold; every step is checked against both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

import cpattn
from cpattn.testing import oracle_attention, run_loopback

HEADS, KV_HEADS, HEAD_DIM, V_HEAD_DIM = 2, 1, 8, 4
LONGEST = 200


def bookkeeping(pool: cpattn.KVPool) -> str:
    """All that a pool knows of requests, steps and pages; the order of free pages included, as it decides which are taken next."""
    requests = {
        name: (request.length, request.held.tolist(), request.owners.tolist(), request.pages) for name, request in pool._requests.items()
    }
    uses = [sorted(counts.items()) for counts in pool._books.uses]
    return repr((requests, pool._books.free, uses, len(pool._history)))


@dataclass
class Script:
    """What a request's tokens are, from the first to the LONGEST one: ``[LONGEST, heads, dim]`` each."""

    q: Tensor
    k: Tensor
    v: Tensor


@dataclass(eq=False)
class Step:
    """A planned step: each rank's plan, the tokens of each request that are new in it, each rank's slots of these (page and
    place), and the requests that were released since."""

    plans: list[cpattn.Plan]
    new: dict[str, slice]
    slots: list[list[tuple[int, int]]] = field(default_factory=list)
    released: set[str] = field(default_factory=set)


class ModelEngine:
    """``cp_size`` ranks with a pool each, all pages full of NaN at first. The model: each request's script, how far it has
    come, and which rank holds each of its tokens.

    Everything is float64 and the backend the reference, so that results are close to the oracle's to a few roundings.
    """

    def __init__(self, cp_size: int, owner: str | cpattn.Striped, num_pages: int = 64, page_size: int = 3, seed: int = 0) -> None:
        self.cp_size = cp_size
        self.owner = owner
        self.sharded = owner != "replicated"
        self.num_pages = num_pages
        self.generator = torch.Generator().manual_seed(seed)
        self.pools = [
            cpattn.KVPool(
                num_pages, page_size, 1, KV_HEADS, HEAD_DIM, V_HEAD_DIM, dtype=torch.float64, cp_size=cp_size, cp_rank=rank, owner=owner
            )
            for rank in range(cp_size)
        ]
        for pool in self.pools:
            pool.k_pages.fill_(torch.nan)
            assert pool.v_pages is not None
            pool.v_pages.fill_(torch.nan)
        self.scripts: dict[str, Script] = {}
        self.owners: dict[str, list[int]] = {}
        self.origins: dict[str, list[Step]] = {}  # the step of each token
        self.steps: list[Step] = []  # that are not undone, the last at the end

    def length(self, name: str) -> int:
        return len(self.owners[name])

    def admit(self, name: str) -> None:
        for pool in self.pools:
            pool.admit(name)
        self.scripts[name] = self._script()
        self.owners[name], self.origins[name] = [], []

    def fork(self, parent: str, child: str, length: int) -> None:
        for pool in self.pools:
            pool.fork(parent, child, length)
        self.scripts[child] = self._script(self.scripts[parent], length)
        self.owners[child], self.origins[child] = self.owners[parent][:length], self.origins[parent][:length]

    def truncate(self, name: str, length: int) -> None:
        """The tokens that follow are others than those that are dropped."""
        for pool in self.pools:
            pool.truncate(name, length)
        self._shorten(name, length)

    def release(self, name: str) -> None:
        for pool in self.pools:
            pool.release(name)
        del self.scripts[name], self.owners[name], self.origins[name]
        for step in self.steps:
            step.released |= {name} & set(step.new)

    def step(
        self,
        extends: Sequence[tuple[str, int]],
        strategy: str = "auto",
        partition: str = "zigzag",
        pad_to: int = 1,
        window: int | None = None,
    ) -> Tensor:
        """Plans and computes a step, checks its output and the cache, and returns the output ``[tokens, Hq, Dv]``."""
        return self.compute(self.plan(extends, partition, pad_to), strategy, window)

    def plan(self, extends: Sequence[tuple[str, int]], partition: str = "zigzag", pad_to: int = 1) -> Step:
        """Plans a step on every rank; its tokens count as cached, but no page holds them yet."""
        plans = [pool.plan(extends, partition=partition, pad_to=pad_to) for pool in self.pools]
        assert len({plan.fingerprint for plan in plans}) == 1
        assert plans[0].batch == tuple((self.length(name), extend) for name, extend in extends)
        step = Step(plans, {name: slice(self.length(name), self.length(name) + extend) for name, extend in extends})
        names = list(step.new)
        if isinstance(self.owner, cpattn.Striped):
            for name, rows in step.new.items():
                self.owners[name] += [position // self.owner.interleave % self.cp_size for position in range(rows.start, rows.stop)]
        else:
            # The plan's chunks in order say which rank has each new token.
            for chunk in plans[0].chunks:
                self.owners[names[chunk.request]] += [chunk.rank] * chunk.length
        for name, rows in step.new.items():
            self.origins[name] += [step] * (rows.stop - rows.start)
        step.slots = [[slot for name, rows in step.new.items() for slot in self.slots(rank, name, rows)] for rank in range(self.cp_size)]
        self.steps.append(step)
        return step

    def compute(self, step: Step, strategy: str = "auto", window: int | None = None) -> Tensor:
        """What the layers do in a step that was planned; its requests are as they were planned, but may have been forked."""
        plan, names = step.plans[0], list(step.new)
        q, k, v = (torch.cat([getattr(self.scripts[name], x)[rows] for name, rows in step.new.items()]) for x in "qkv")

        def program(communicator: cpattn.Communicator) -> Tensor:
            pool, meta = self.pools[communicator.rank], plan.metadata(communicator.rank)
            local_q, local_k, local_v = (cpattn.shard(x, meta) for x in (q, k, v))
            for x in (local_q, local_k, local_v):
                x[meta.num_tokens :] = torch.nan
            out = cpattn.cp_attention(
                local_q,
                local_k,
                local_v,
                meta,
                group=communicator,
                kv_cache=pool.layer(0, pool.page_table(names)),
                strategy=strategy,
                backend="reference",
                window=window,
                check=True,
            )
            if self.sharded and window is not None:
                # The same of what lies in the pages by now.
                cache = pool.layer(0, pool.page_table(names))
                again = cpattn.attend(local_q, cache, meta, group=communicator, backend="reference", window=window)
                torch.testing.assert_close(again, out)
            return cpattn.unshard(out, meta, group=communicator)

        outputs = run_loopback(program, self.cp_size)
        prefix_k, prefix_v = (torch.cat([getattr(self.scripts[name], x)[: rows.start] for name, rows in step.new.items()]) for x in "kv")
        expected, _ = oracle_attention(q, k, v, plan.batch, prefix_k=prefix_k, prefix_v=prefix_v, window=window)
        for out in outputs:
            assert torch.equal(out, outputs[0])
            torch.testing.assert_close(out, expected)
        self.check()
        return outputs[0]

    def undo(self, spoiled_ranks: Sequence[int] = ()) -> None:
        """Takes the last step back, after it has written NaN for its new tokens on some ranks, as one does that fails in the middle."""
        step = self.steps[-1]
        for rank in spoiled_ranks:
            for page, place in step.slots[rank]:
                for pages in self.both_pages(rank):
                    pages[0, page, place] = torch.nan
        for pool, plan in zip(self.pools, step.plans, strict=True):
            pool.undo(plan)
        self.steps.pop()
        for name, rows in step.new.items():
            if name not in step.released:
                self._shorten(name, min(rows.start, self.length(name)))
        for rank in range(self.cp_size):
            # A page that the step had taken may be another's by now: a copy that a step made is kept when that is undone.
            kept = {slot for name in self.owners for slot in self.slots(rank, name, slice(None))}
            for page, place in set(step.slots[rank]) - kept:
                assert all((pages[0, page, place] == 0).all() for pages in self.both_pages(rank)), f"page {page}, {place} on rank {rank}"
        self.check()

    def heirs(self, step: Step) -> set[str]:
        """Requests that were forked from tokens of a step and still have some, for which it cannot be undone."""
        own = set(step.new) - step.released
        return {name for name, origins in self.origins.items() if name not in own and any(origin is step for origin in origins)}

    def slots(self, rank: int, name: str, tokens: slice) -> list[tuple[int, int]]:
        """The page and the place in it of those of a request's tokens that a rank holds."""
        pool = self.pools[rank]
        line = pool.page_table([name])[0].tolist()
        held = [token for token, owner in enumerate(self.owners[name]) if owner == rank or not self.sharded]
        return [(line[n // pool.page_size], n % pool.page_size) for n, token in enumerate(held) if token in range(LONGEST)[tokens]]

    def both_pages(self, rank: int) -> tuple[Tensor, Tensor]:
        pool = self.pools[rank]
        assert pool.v_pages is not None
        return pool.k_pages, pool.v_pages

    def check(self) -> None:
        """Each rank's pages hold each request's tokens to the bit, and all pages are either in use or free.

        Tokens that are planned and not computed yet are not there; call it when there are none.
        """
        in_use = []
        for rank, pool in enumerate(self.pools):
            used: set[int] = set()
            for name, owners in self.owners.items():
                assert pool.length(name) == len(owners)
                held = [token for token, owner in enumerate(owners) if owner == rank or not self.sharded]
                slots = self.slots(rank, name, slice(None))
                used |= {page for page, _ in slots}
                for pages, script in zip(self.both_pages(rank), (self.scripts[name].k, self.scripts[name].v), strict=True):
                    for token, (page, place) in zip(held, slots, strict=True):
                        assert torch.equal(pages[0, page, place], script[token]), f"token {token} of {name} on rank {rank}"
            in_use.append(len(used))
        # A page that several requests share, part-filled or not, is in use once.
        assert {pool.free_pages for pool in self.pools} == {self.num_pages - max(in_use)}

    def _script(self, parent: Script | None = None, length: int = 0) -> Script:
        """Random tokens, of which the first are those of another script."""
        dims = ((HEADS, HEAD_DIM), (KV_HEADS, HEAD_DIM), (KV_HEADS, V_HEAD_DIM))
        script = Script(*(torch.randn(LONGEST, *dim, generator=self.generator, dtype=torch.float64) for dim in dims))
        if parent is not None:
            for x, first in zip(vars(script).values(), vars(parent).values(), strict=True):
                x[:length] = first[:length]
        return script

    def _shorten(self, name: str, length: int) -> None:
        self.scripts[name] = self._script(self.scripts[name], length)
        del self.owners[name][length:], self.origins[name][length:]
