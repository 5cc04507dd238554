"""Any interleaving of what an engine does to its pools, against a plain model of the cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from engines.model_engine import LONGEST, ModelEngine, Step, bookkeeping
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import cpattn

NAMES = "abcde"
STRATEGIES = {False: ["auto", "all_gather", "ring"], True: ["auto", "pass_q", "pass_q_ring", "ring"]}


def changes_nothing(engine: ModelEngine, refused: Callable[[int], object], error: type[cpattn.CPError]) -> None:
    """The pools of all ranks refuse it alike, and neither their books nor their pages change."""
    messages = set()
    for rank, pool in enumerate(engine.pools):
        before, pages = bookkeeping(pool), [x.clone() for x in engine.both_pages(rank)]
        try:
            refused(rank)
        except error as refusal:
            messages.add(str(refusal))
        else:
            raise AssertionError("the pool took it")
        assert bookkeeping(pool) == before
        for now, then in zip(engine.both_pages(rank), pages, strict=True):
            assert now.view(torch.int64).equal(then.view(torch.int64))
    assert len(messages) == 1


class PoolMachine(RuleBasedStateMachine):
    """Admit, prefill chunk, decode, fork, truncate, fail, undo and finish on 1 to 4 ranks with few pages; a full pool is a part of
    the game."""

    engine: ModelEngine

    @initialize(
        cp_size=st.integers(1, 4),
        owner=st.sampled_from(["replicated", "computed", cpattn.Striped(1), cpattn.Striped(5)]),
        page_size=st.sampled_from([1, 3, 4, 16]),
        num_pages=st.integers(4, 24),
        seed=st.integers(0, 1000),
    )
    def start(self, cp_size: int, owner: str | cpattn.Striped, page_size: int, num_pages: int, seed: int) -> None:
        self.engine = ModelEngine(cp_size, owner, num_pages, page_size, seed)
        self.engine.admit(NAMES[0])

    @property
    def running(self) -> list[str]:
        return list(self.engine.owners)

    @precondition(lambda self: len(self.running) < len(NAMES))
    @rule()
    def admit(self) -> None:
        self.engine.admit(self._unused())

    @precondition(lambda self: self.running)
    @rule(data=st.data(), partition=st.sampled_from(["zigzag", "contiguous", "whole"]), pad_to=st.sampled_from([1, 1, 4]))
    def step(self, data: st.DataObject, partition: str, pad_to: int) -> None:
        """Some of the requests in any order, each idle, decoding or with a chunk of prefill; at times one is forked before the
        layers have written its tokens."""
        strategy = data.draw(st.sampled_from(STRATEGIES[self.engine.sharded]))
        planned = self._plan(data, partition, pad_to)
        if planned:
            if len(self.running) < len(NAMES) and data.draw(st.booleans()):
                self._fork(data)
            self.engine.compute(planned, strategy)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), again=st.booleans())
    def fail(self, data: st.DataObject, again: bool) -> None:
        """A step that raises in the middle, some ranks having written what is no use; undone, the same step gets the same pages."""
        planned = self._plan(data)
        if planned:
            extends = [(name, rows.stop - rows.start) for name, rows in planned.new.items()]
            tables = [pool.page_table(list(planned.new)).tolist() for pool in self.engine.pools]
            self.engine.undo(data.draw(st.sets(st.integers(0, self.engine.cp_size - 1)).map(sorted)))
            if again:
                second = self.engine.plan(extends)
                assert [pool.page_table(list(second.new)).tolist() for pool in self.engine.pools] == tables
                self.engine.compute(second)

    @precondition(lambda self: hasattr(self, "engine") and len(self.engine.steps) > 0)
    @rule(data=st.data())
    def undo(self, data: st.DataObject) -> None:
        """A step that was computed, if no request forked since has tokens of it; any other step is refused."""
        *earlier, last = self.engine.steps
        if earlier:
            wrong = data.draw(st.sampled_from(earlier))
            changes_nothing(self.engine, lambda rank: self.engine.pools[rank].undo(wrong.plans[rank]), cpattn.CPError)
        if self.engine.heirs(last):
            changes_nothing(self.engine, lambda rank: self.engine.pools[rank].undo(last.plans[rank]), cpattn.CPError)
        else:
            self.engine.undo()
            changes_nothing(self.engine, lambda rank: self.engine.pools[rank].undo(last.plans[rank]), cpattn.CPError)

    @precondition(lambda self: self.running and len(self.running) < len(NAMES))
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        self._fork(data)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.running))
        length = self.engine.length(name)
        # A few drafts, or any number.
        self.engine.truncate(name, data.draw(st.integers(max(0, length - 3), length) | st.integers(0, length)))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        self.engine.release(data.draw(st.sampled_from(self.running)))

    @invariant()
    def cache_holds_what_it_should(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check()

    @invariant()
    def all_ranks_have_the_same_books(self) -> None:
        if hasattr(self, "engine"):
            assert len(set(map(bookkeeping, self.engine.pools))) == 1

    def teardown(self) -> None:
        """All pages come back."""
        if hasattr(self, "engine"):
            for name in self.running:
                self.engine.release(name)
            assert {pool.free_pages for pool in self.engine.pools} == {self.engine.num_pages}

    def _plan(self, data: st.DataObject, partition: str = "zigzag", pad_to: int = 1) -> Step | None:
        """None where there are too few pages."""
        names = data.draw(st.permutations(self.running))[: data.draw(st.integers(1, len(self.running)))]
        extend = st.sampled_from([0, 1, 1]) | st.integers(2, 25)
        extends = [(name, min(data.draw(extend), LONGEST - self.engine.length(name))) for name in names]
        try:
            return self.engine.plan(extends, partition, pad_to)
        except cpattn.PoolFullError:
            pools = self.engine.pools
            changes_nothing(self.engine, lambda rank: pools[rank].plan(extends, partition=partition, pad_to=pad_to), cpattn.PoolFullError)
            return None

    def _fork(self, data: st.DataObject) -> None:
        parent = data.draw(st.sampled_from(self.running))
        self.engine.fork(parent, self._unused(), data.draw(st.integers(0, self.engine.length(parent))))

    def _unused(self) -> str:
        return next(name for name in NAMES if name not in self.engine.owners)


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=15, deadline=None)
TestPoolMachine = PoolMachine.TestCase
