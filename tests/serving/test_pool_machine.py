"""Any interleaving of what an engine does to its pools, against a plain model of the cache."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from model_engine import LONGEST, ModelEngine

import cpattn

NAMES = "abcde"
STRATEGIES = {False: ["auto", "all_gather", "ring"], True: ["auto", "pass_q", "pass_q_ring", "ring"]}


def bookkeeping(pool: cpattn.KVPool) -> dict[str, Any]:
    """All of a pool's state but the pages themselves."""
    return copy.deepcopy({name: value for name, value in vars(pool).items() if not isinstance(value, torch.Tensor)})


def changes_nothing(engine: ModelEngine, refused: Callable[[cpattn.KVPool], object]) -> None:
    """The pools of all ranks refuse it alike, and neither their books nor their pages change."""
    messages = set()
    for pool in engine.pools:
        before, pages = bookkeeping(pool), pool.k_pages.clone()
        try:
            refused(pool)
        except cpattn.PoolFullError as error:
            messages.add(str(error))
        else:
            raise AssertionError("the pool took it")
        assert repr(bookkeeping(pool)) == repr(before)
        assert torch.equal(pool.k_pages.nan_to_num(7.0), pages.nan_to_num(7.0))
    assert len(messages) == 1


class PoolMachine(RuleBasedStateMachine):
    """Admit, prefill chunk, decode, fork and finish on 1 to 4 ranks with few pages; a full pool is a part of the game."""

    engine: ModelEngine

    @initialize(
        cp_size=st.integers(1, 4),
        sharded=st.booleans(),
        page_size=st.sampled_from([1, 3, 4, 16]),
        num_pages=st.integers(4, 24),
        seed=st.integers(0, 1000),
    )
    def start(self, cp_size: int, sharded: bool, page_size: int, num_pages: int, seed: int) -> None:
        self.engine = ModelEngine(cp_size, sharded, num_pages, page_size, seed)
        self.engine.admit(NAMES[0])

    @property
    def running(self) -> list[str]:
        return list(self.engine.owners)

    @precondition(lambda self: len(self.running) < len(NAMES))
    @rule()
    def admit(self) -> None:
        self.engine.admit(self._unused())

    @precondition(lambda self: self.running)
    @rule(data=st.data(), partition=st.sampled_from(["zigzag", "contiguous"]), pad_to=st.sampled_from([1, 1, 4]))
    def step(self, data: st.DataObject, partition: str, pad_to: int) -> None:
        """Some of the requests in any order, each idle, decoding or with a chunk of prefill."""
        names = data.draw(st.permutations(self.running))[: data.draw(st.integers(1, len(self.running)))]
        extend = st.sampled_from([0, 1, 1]) | st.integers(2, 25)
        extends = [(name, min(data.draw(extend), LONGEST - self.engine.length(name))) for name in names]
        strategy = data.draw(st.sampled_from(STRATEGIES[self.engine.sharded]))
        try:
            self.engine.step(extends, strategy, partition, pad_to)
        except cpattn.PoolFullError:
            changes_nothing(self.engine, lambda pool: pool.plan(extends, partition=partition, pad_to=pad_to))

    @precondition(lambda self: self.running and len(self.running) < len(NAMES))
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        parent, child = data.draw(st.sampled_from(self.running)), self._unused()
        length = data.draw(st.integers(0, self.engine.length(parent)))
        try:
            self.engine.fork(parent, child, length)
        except cpattn.PoolFullError:
            changes_nothing(self.engine, lambda pool: pool.fork(parent, child, length))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        self.engine.release(data.draw(st.sampled_from(self.running)))

    @invariant()
    def cache_holds_what_it_should(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check()

    def teardown(self) -> None:
        """All pages come back."""
        if hasattr(self, "engine"):
            for name in self.running:
                self.engine.release(name)
            assert {pool.free_pages for pool in self.engine.pools} == {self.engine.num_pages}

    def _unused(self) -> str:
        return next(name for name in NAMES if name not in self.engine.owners)


PoolMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=15, deadline=None)
TestPoolMachine = PoolMachine.TestCase
