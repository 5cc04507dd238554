"""A small engine over KVPools, beside a plain model of what its cache must hold; every step is checked against both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import cpattn
from cpattn.testing import oracle_attention, run_loopback

HEADS, KV_HEADS, HEAD_DIM, V_HEAD_DIM = 2, 1, 8, 4
LONGEST = 200


@dataclass
class Script:
    """What a request's tokens are, from the first to the LONGEST one: ``[LONGEST, heads, dim]`` each."""

    q: Tensor
    k: Tensor
    v: Tensor


class ModelEngine:
    """``cp_size`` ranks with a pool each, all pages full of NaN at first. The model: each request's script, how far it has
    come, and which rank holds each of its tokens.

    Everything is float64 and the backend the reference, so that results are close to the oracle's to a few roundings.
    """

    def __init__(self, cp_size: int, sharded: bool, num_pages: int = 64, page_size: int = 3, seed: int = 0) -> None:
        self.cp_size = cp_size
        self.sharded = sharded
        self.num_pages = num_pages
        self.generator = torch.Generator().manual_seed(seed)
        self.pools = [
            cpattn.KVPool(
                num_pages, page_size, 1, KV_HEADS, HEAD_DIM, V_HEAD_DIM, dtype=torch.float64, cp_size=cp_size, cp_rank=rank, sharded=sharded
            )
            for rank in range(cp_size)
        ]
        for pool in self.pools:
            pool.k_pages.fill_(torch.nan)
            assert pool.v_pages is not None
            pool.v_pages.fill_(torch.nan)
        self.scripts: dict[str, Script] = {}
        self.owners: dict[str, list[int]] = {}

    def length(self, name: str) -> int:
        return len(self.owners[name])

    def admit(self, name: str) -> None:
        for pool in self.pools:
            pool.admit(name)
        dims = ((HEADS, HEAD_DIM), (KV_HEADS, HEAD_DIM), (KV_HEADS, V_HEAD_DIM))
        self.scripts[name] = Script(*(torch.randn(LONGEST, *dim, generator=self.generator, dtype=torch.float64) for dim in dims))
        self.owners[name] = []

    def fork(self, parent: str, child: str, length: int) -> None:
        for pool in self.pools:
            pool.fork(parent, child, length)
        dims = ((HEADS, HEAD_DIM), (KV_HEADS, HEAD_DIM), (KV_HEADS, V_HEAD_DIM))
        self.scripts[child] = Script(*(torch.randn(LONGEST, *dim, generator=self.generator, dtype=torch.float64) for dim in dims))
        for of_child, of_parent in zip(vars(self.scripts[child]).values(), vars(self.scripts[parent]).values(), strict=True):
            of_child[:length] = of_parent[:length]
        self.owners[child] = self.owners[parent][:length]

    def release(self, name: str) -> None:
        for pool in self.pools:
            pool.release(name)
        del self.scripts[name], self.owners[name]

    def step(self, extends: Sequence[tuple[str, int]], strategy: str = "auto", partition: str = "zigzag", pad_to: int = 1) -> Tensor:
        """Plans and computes a step, checks its output and the cache, and returns the output ``[tokens, Hq, Dv]``."""
        plans = [pool.plan(extends, partition=partition, pad_to=pad_to) for pool in self.pools]
        plan = plans[0]
        assert len({plan.fingerprint for plan in plans}) == 1
        assert plan.batch == tuple((self.length(name), extend) for name, extend in extends)
        names = [name for name, _ in extends]
        new = [slice(self.length(name), self.length(name) + extend) for name, extend in extends]
        q, k, v = (torch.cat([getattr(self.scripts[name], x)[rows] for name, rows in zip(names, new, strict=True)]) for x in "qkv")

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
                check=True,
            )
            return cpattn.unshard(out, meta, group=communicator)

        outputs = run_loopback(program, self.cp_size)
        self._append(names, plan)
        prefix_k, prefix_v = (
            torch.cat([getattr(self.scripts[name], x)[: rows.start] for name, rows in zip(names, new, strict=True)]) for x in "kv"
        )
        expected, _ = oracle_attention(q, k, v, plan.batch, prefix_k=prefix_k, prefix_v=prefix_v)
        for out in outputs:
            assert torch.equal(out, outputs[0])
            torch.testing.assert_close(out, expected)
        self.check()
        return outputs[0]

    def check(self) -> None:
        """Each rank's pages hold each request's tokens to the bit, and all pages are either in use or free."""
        in_use = []
        for rank, pool in enumerate(self.pools):
            tables = {name: pool.page_table([name])[0].tolist() for name in self.scripts}
            used: set[int] = set()
            for name, owners in self.owners.items():
                assert pool.length(name) == len(owners)
                held = [token for token, owner in enumerate(owners) if owner == rank or not self.sharded]
                slots = [(tables[name][n // pool.page_size], n % pool.page_size) for n in range(len(held))]
                used |= {page for page, _ in slots}
                for pages, script in ((pool.k_pages, self.scripts[name].k), (pool.v_pages, self.scripts[name].v)):
                    assert pages is not None
                    for token, (page, place) in zip(held, slots, strict=True):
                        assert torch.equal(pages[0, page, place], script[token]), f"token {token} of {name} on rank {rank}"
            in_use.append(len(used))
        assert {pool.free_pages for pool in self.pools} == {self.num_pages - max(in_use)}

    def _append(self, names: list[str], plan: cpattn.Plan) -> None:
        """The plan's chunks in order say which rank has each new token."""
        for chunk in plan.chunks:
            self.owners[names[chunk.request]] += [chunk.rank] * chunk.length
