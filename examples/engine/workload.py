"""What is asked of the engine: requests of all kinds, arriving at different steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Request:
    """One prompt to be continued.

    Attributes:
        name: unique.
        prompt: token ids, at least one.
        new_tokens: how many to generate.
        arrival: the step from which on it may be scheduled.
        follows: the request whose prompt and answer come before this prompt: the next turn of a conversation. It
            arrives once that one is finished.
    """

    name: str
    prompt: tuple[int, ...]
    new_tokens: int
    arrival: int
    follows: str | None = None


def make_requests(seed: int, vocab_size: int, new_tokens: int) -> list[Request]:
    """Prompts of awkward lengths: one token, fewer than two a rank, primes, several hundred, and shared beginnings."""
    rng = np.random.default_rng(seed)

    def random(length: int) -> tuple[int, ...]:
        return tuple(rng.integers(0, vocab_size, length).tolist())

    system, document = random(137), random(613)
    few = max(1, new_tokens // 3)
    return [
        Request("one token", random(1), new_tokens, 0),
        Request("prime", random(97), few, 0),
        Request("document", document, new_tokens, 0),
        Request("three tokens", random(3), new_tokens, 1),
        Request("system + 7", system + random(7), new_tokens, 2),
        Request("seven tokens", random(7), few, 3),
        Request("other end", document[:401] + random(53), new_tokens, 8),
        Request("system + 64", system + random(64), few, 9),
        Request("document again", document, few, 11),
        Request("next turn", random(31), new_tokens, 12, follows="system + 7"),
        Request("long", random(509), few, 14),
        Request("third turn", random(1), few, 16, follows="next turn"),
        Request("late", random(2), new_tokens, 60),
    ]
