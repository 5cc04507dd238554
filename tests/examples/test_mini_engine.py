"""The example engine: its scheduler over random workloads, and the whole of it against the model's own ``generate``."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engine.scheduler import Scheduler, Step
from engine.workload import Request, make_requests
from programs.example_runs import alone

import cpattn

VOCAB = 1000


def next_token(tokens: list[int]) -> int:
    """Stands for a model: depends on every token and its place."""
    return sum((place + 1) * token for place, token in enumerate(tokens)) % VOCAB


def random_requests(rng: np.random.Generator) -> list[Request]:
    """Few tokens to choose from and prompts cut from one text, so that many begin alike."""
    text = rng.integers(0, 3, 60).tolist()
    requests: list[Request] = []
    for number in range(rng.integers(1, 9)):
        own = rng.integers(0, VOCAB, rng.integers(1, 5)).tolist()
        follows = requests[rng.integers(0, number)].name if number and rng.random() < 0.3 else None
        prompt = [*text[: rng.integers(0, 60)], *own]
        requests.append(Request(str(number), tuple(prompt), int(rng.integers(1, 8)), int(rng.integers(0, 12)), follows))
    return requests


def run_step(pool: cpattn.KVPool, step: Step, spoiled: float | None = None) -> list[int | None]:
    """Writes each token as its own key, and reads the context back from the pages to continue it; or writes what is no use."""
    meta = step.plan.metadata(0)
    table = pool.page_table([state.name for state, _ in step.work])
    cache = pool.layer(0, table)
    keys = torch.tensor(step.token_ids, dtype=torch.float32)[:, None, None]
    if spoiled is not None:
        keys = keys * spoiled
    gathered, _ = cpattn.gather_kv(cpattn.shard(keys, meta), None, meta)
    cpattn.write_kv(gathered, None, cache, cpattn.slot_mapping(meta, table, pool.page_size))
    out: list[int | None] = []
    if spoiled is not None:
        return out
    for (state, _), line, last in zip(step.work, table, step.last_rows, strict=True):
        context = cache.k_pages[line.long()].flatten()[: pool.length(state.name)].long().tolist()
        assert context == state.tokens[: len(context)]
        out.append(None if last is None else next_token(context))
    return out


@pytest.mark.parametrize("seed", range(40))
def test_scheduler_serves_any_workload(seed: int) -> None:
    rng = np.random.default_rng(seed)
    requests, budget, page_size = random_requests(rng), int(rng.integers(1, 40)), int(rng.integers(1, 9))
    # Enough for the longest conversation alone, which may be all of them, and no more than a little more.
    longest = sum(len(request.prompt) + request.new_tokens for request in requests)
    num_pages = -(-longest // page_size) + int(rng.integers(0, 4))
    if not any(request.follows for request in requests):
        num_pages = -(-max(len(request.prompt) + request.new_tokens for request in requests) // page_size) + int(rng.integers(0, 4))
    pool = cpattn.KVPool(num_pages, page_size, 1, 1, 1, 0)
    scheduler = Scheduler(pool, requests, budget)
    failures = np.random.default_rng(seed)
    for count, step in enumerate(scheduler.steps()):
        assert count < 2000
        assert 0 < step.plan.num_tokens <= budget
        if failures.random() < 0.2:
            chunks = [state.chunks for state, _ in step.work]
            run_step(pool, step, torch.nan)
            scheduler.take_back(step)
            before = [state.chunks + (pool.length(state.name) < state.prompt_len) for state, _ in step.work]
            assert before == chunks
            assert not pool.k_pages.isnan().any()
            continue
        scheduler.append(step, run_step(pool, step))
    for state in scheduler.states.values():
        tokens = state.tokens[: state.prompt_len]
        before = scheduler.states[state.request.follows].tokens if state.request.follows else []
        assert tokens == [*before, *state.request.prompt]
        for token in state.answer:
            assert token == next_token(tokens)
            tokens.append(token)
        assert len(state.answer) == state.request.new_tokens
    scheduler.release_all()
    assert pool.free_pages == num_pages


def test_scheduler_reuses_evicts_and_preempts() -> None:
    """The workloads above must not pass for want of anything to do."""
    reused = evicted = waited = preempted = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        pool = cpattn.KVPool(18, 4, 1, 1, 1, 0)
        scheduler = Scheduler(pool, [request for request in random_requests(rng) if not request.follows], 30)
        for step in scheduler.steps():
            scheduler.append(step, run_step(pool, step))
        states = scheduler.states.values()
        reused += sum(state.reused is not None for state in states)
        preempted += sum(state.preempted for state in states)
        evicted += scheduler.evictions
        waited += scheduler.waits
    assert min(reused, evicted, waited, preempted) >= 10, (reused, evicted, waited, preempted)


def test_a_request_that_can_never_fit_is_an_error() -> None:
    pool = cpattn.KVPool(2, 4, 1, 1, 1, 0)
    scheduler = Scheduler(pool, [Request("long", (1,) * 9, 1, 0)], 16)
    with pytest.raises(cpattn.PoolFullError, match="need 3 pages of 4 tokens"):
        list(scheduler.steps())


def test_the_requests_are_awkward() -> None:
    requests = make_requests(seed=0, vocab_size=VOCAB, new_tokens=6)
    assert {1, 2, 3, 7, 97, 613} <= {len(request.prompt) for request in requests}
    assert requests == make_requests(seed=0, vocab_size=VOCAB, new_tokens=6)


def test_every_token_equals_that_of_generate(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    assert alone("mini_engine", "--cp", "2", "--new-tokens", "3", "--budget", "256") == 0
    printed = capsys.readouterr().out
    assert printed.count("27 of 27 tokens equal those of generate") == 2
    assert printed.count("  401 of ") >= 2
    assert printed.count(", and 1 failed and planned again; ") == 2
    assert " NO" not in printed


def test_tokens_and_logits_that_differ_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    from engine.rank import Expected, Served
    from mini_engine import print_table

    top = [(3.0, 1.0), (4.0, 1.0)]
    served = [Served("a", [5], [1, 2], top, None, 1, 0), Served("b", [5], [3], top[:1], ("a", 1), 1, 0)]
    near, far = [(3.0, 1.0), (4.0, 1.0 + 2**-20)], [(3.0, 1.0), (4.0, 1.5)]
    last = Expected([3], top[:1], top[:1])
    assert print_table(served, [Expected([1, 2], near, top), last])
    assert not print_table(served, [Expected([1, 7], near, top), last])
    assert not print_table(served, [Expected([1, 2], far, far), last])
    out = capsys.readouterr().out
    assert out.count("3 of 3 tokens equal") == 2
    assert out.count("2 of 3 tokens equal") == 1
    lines = [line.split()[-1] for line in out.splitlines() if line.startswith(("a ", "b "))]
    assert lines == ["yes", "yes", "NO", "yes", "yes", "yes"]
