"""Continuous batching over a KVPool: which requests get how many new tokens in a step, and whose pages are given up.

It looks at token ids and lengths alone, so every rank runs its own and comes to the same steps without a message.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import cpattn
from engine.workload import Request


@dataclass(eq=False)
class State:
    """A request on its way.

    Attributes:
        tokens: its prompt and what has been generated.
        prompt_len: where the answer begins; 0 before the request has arrived.
        reused: whose cached tokens it began with when it was last admitted, and how many; None if there were none.
        chunks: the steps that it took to compute the prompt.
        preempted: how often its pages were given up.
    """

    request: Request
    tokens: list[int] = field(default_factory=list)
    prompt_len: int = 0
    reused: tuple[str, int] | None = None
    chunks: int = 0
    preempted: int = 0

    @property
    def name(self) -> str:
        return self.request.name

    @property
    def answer(self) -> list[int]:
        return self.tokens[self.prompt_len :]

    @property
    def finished(self) -> bool:
        return 0 < self.prompt_len <= len(self.tokens) - self.request.new_tokens


@dataclass(frozen=True, eq=False)
class Step:
    """What one forward pass computes.

    Attributes:
        work: each request with its number of new tokens.
        plan: of these; their pages are taken.
        token_ids: the new tokens, request after request.
        last_rows: the place in ``token_ids`` of each request's last token, None where the prompt goes on after it.
    """

    work: list[tuple[State, int]]
    plan: cpattn.Plan
    token_ids: list[int]
    last_rows: list[int | None]


class Scheduler:
    """Decodes first, then prefills in the order of arrival, up to ``budget`` tokens a step.

    Pages of finished requests stay until they are needed, so that later prompts can begin with them. When a step does
    not fit, the oldest finished request goes; then the newest work waits, and no one is admitted until a request has
    finished; and when nothing else would run, the newest request gives up its pages and is computed again later. The
    oldest request thus always gets on.

    Attributes:
        states: of all requests, by name.
        evictions: how often a finished request went.
        waits: the steps in which work waited for pages.

    Args:
        pool: with enough pages for the longest request alone.
        requests: all that will arrive.
        budget: new tokens of a step, at most.
    """

    def __init__(self, pool: cpattn.KVPool, requests: Sequence[Request], budget: int) -> None:
        self._pool = pool
        self._budget = budget
        self.states = {request.name: State(request) for request in requests}
        self._coming = list(self.states.values())
        self._waiting: list[State] = []
        self._running: list[State] = []
        self._resident: list[State] = []  # finished, with their pages, the oldest first
        self._clock = 0
        self._full = False  # work has waited, and no request has finished since
        self.evictions = 0
        self.waits = 0

    def steps(self) -> Iterator[Step]:
        """The steps until all requests are finished. Call :meth:`append` for each before the next, or :meth:`take_back`."""
        while self._coming or self._waiting or self._running:
            self._arrive()
            self._clock += 1
            if self._running or self._waiting:
                yield self._next_step()

    def append(self, step: Step, tokens: Sequence[int | None]) -> None:
        """Takes the generated token of each request of the step, None where there is none."""
        for (state, _), token in zip(step.work, tokens, strict=True):
            if token is not None:
                state.tokens.append(token)
            if state.finished:
                self._running.remove(state)
                self._resident.append(state)
                self._full = False

    def take_back(self, step: Step) -> None:
        """Undoes a step that failed, on whichever rank: its tokens are not in the cache. The next step is planned from there."""
        self._pool.undo(step.plan)
        for state, _ in step.work:
            state.chunks -= self._pool.length(state.name) < state.prompt_len

    def release_all(self) -> None:
        """Gives back all pages of finished requests."""
        while self._evict():
            pass

    def _arrive(self) -> None:
        for state in list(self._coming):
            request = state.request
            before = self.states[request.follows] if request.follows else None
            if request.arrival <= self._clock and (before is None or before.finished):
                state.tokens = [*(before.tokens if before else []), *request.prompt]
                state.prompt_len = len(state.tokens)
                self._coming.remove(state)
                self._waiting.append(state)

    def _next_step(self) -> Step:
        missing = {state: len(state.tokens) - self._pool.length(state.name) for state in self._running}
        left = self._budget
        work: dict[State, int] = {}
        for state in sorted(self._running, key=lambda state: missing[state] > 1):  # decodes first, else as they are
            work[state] = min(missing[state], left)
            left -= work[state]
        while self._waiting and left and not self._full:
            state = self._waiting.pop(0)
            self._admit(state)
            self._running.append(state)
            work[state] = min(len(state.tokens) - self._pool.length(state.name), left)
            left -= work[state]
        # In the order of admission, so that the last is the newest.
        chosen = [(state, work[state]) for state in self._running if work[state]]
        wanted = len(chosen)
        plan, chosen = self._take_pages(chosen)
        self.waits += len(chosen) < wanted
        token_ids: list[int] = []
        last_rows: list[int | None] = []
        for state, count in chosen:
            end = self._pool.length(state.name)
            token_ids += state.tokens[end - count : end]
            last_rows.append(len(token_ids) - 1 if end == len(state.tokens) else None)
            state.chunks += end - count < state.prompt_len
        return Step(chosen, plan, token_ids, last_rows)

    def _take_pages(self, work: list[tuple[State, int]]) -> tuple[cpattn.Plan, list[tuple[State, int]]]:
        """A plan of the work, or of as much of it as there are pages for."""
        while (plan := self._plan(work)) is None:
            if self._evict():
                self.evictions += 1
                continue
            self._full = True
            if len(work) > 1:
                work = work[:-1]
            else:
                newest = self._preempt()
                oldest = self._running[0]
                missing = len(oldest.tokens) - self._pool.length(oldest.name)
                work = [one for one in work if one[0] is not newest] or [(oldest, min(missing, self._budget))]
        return plan, work

    def _plan(self, work: list[tuple[State, int]]) -> cpattn.Plan | None:
        """None where the pool is too full, and someone can still make room."""
        try:
            return self._pool.plan([(state.name, count) for state, count in work])
        except cpattn.PoolFullError:
            if self._resident or len(self._running) > 1:
                return None
            raise

    def _admit(self, state: State) -> None:
        """Gives the request a place in the pool, with the longest beginning that some other request has there."""
        state.reused = None
        found = self._longest_prefix(state)
        if found is None:
            self._pool.admit(state.name)
        else:
            parent, length = found
            self._pool.fork(parent.name, state.name, length)
            state.reused = parent.name, length

    def _longest_prefix(self, state: State) -> tuple[State, int] | None:
        """Whose cached tokens the request's begin with, and how many of them.

        Compares with every request in the pool; an engine for thousands would keep a tree of the pages' hashes.
        """
        # The last token has to be computed, for its logits.
        wanted = state.tokens[:-1]
        best = None
        for other in [*self._running, *self._resident]:
            cached = other.tokens[: self._pool.length(other.name)]
            length = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(wanted, cached, strict=False)))
            if length > (best[1] if best else 0):
                best = other, length
        return best

    def _evict(self) -> bool:
        """Gives up the pages of the oldest finished request; whether there was one."""
        if not self._resident:
            return False
        self._pool.release(self._resident.pop(0).name)
        return True

    def _preempt(self) -> State:
        """Sends the newest running request back to the head of the queue, without its pages."""
        state = self._running.pop()
        self._pool.release(state.name)
        self._waiting.insert(0, state)
        state.preempted += 1
        return state
