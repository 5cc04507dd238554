"""Requests through one of nano-vllm's engines, step by step, with the time of each first token."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from nanovllm import SamplingParams


class Request(NamedTuple):
    """Attributes:
    prompt: token ids.
    new_tokens: how many to generate.
    arrival: when, by the clock of :func:`serve`.
    """

    prompt: list[int]
    new_tokens: int
    arrival: float = 0.0


class Answer(NamedTuple):
    """Attributes:
    tokens: those generated.
    tops: the two largest logits of each, where the engine records them.
    first: seconds from the arrival to the first token.
    last: seconds from the arrival to the last.
    """

    tokens: list[int]
    tops: list[list[float]]
    first: float
    last: float


class Steps:
    """A clock that counts steps, for arrivals that are the same in every run."""

    def __init__(self) -> None:
        self.now = -1.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def random_tokens(seed: int, count: int, vocab: int) -> list[int]:
    """``count`` token ids."""
    tokens: list[int] = torch.randint(vocab, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return tokens


def serve(engine: Any, requests: Sequence[Request], clock: Callable[[], float] | None = None) -> list[Answer]:
    """Serves requests, greedily. Arrivals are in seconds from now, or as ``clock`` counts, which is asked once a step."""
    begin = time.perf_counter()
    clock = clock or (lambda: time.perf_counter() - begin)
    coming = sorted(range(len(requests)), key=lambda number: requests[number].arrival)
    seqs: dict[int, Any] = {}
    arrived: dict[int, float] = {}
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    while coming or not engine.is_finished():
        now = clock()
        while coming and requests[coming[0]].arrival <= now:
            number = coming.pop(0)
            request = requests[number]
            # Its sampler divides by the temperature, and has no way to be greedy but a very small one.
            options = SamplingParams(temperature=1e-9, max_tokens=request.new_tokens, ignore_eos=True)
            engine.add_request(request.prompt, options)
            seqs[number] = engine.scheduler.waiting[-1]
            arrived[number] = time.perf_counter()
        if engine.is_finished():
            continue
        engine.step()
        done = time.perf_counter()
        for number, seq in seqs.items():
            if number not in first and seq.num_completion_tokens:
                first[number] = done - arrived[number]
            if number not in last and seq.is_finished:
                last[number] = done - arrived[number]
    tops = engine.model_runner.tops
    numbers = range(len(requests))
    return [Answer(seqs[n].completion_token_ids, tops.pop(seqs[n].seq_id, []), first[n], last[n]) for n in numbers]
