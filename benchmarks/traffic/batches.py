"""Random batches of an engine's steps, with lengths as in a public trace.

The trace is ``conversation_trace.jsonl`` of Mooncake (github.com/kvcache-ai/Mooncake, FAST25-release/traces, commit 3b5a59413395; Qin et
al., arXiv:2407.00079): 12,031 requests. Of their prompts the logarithm has a mean of 8.74 and a deviation of 1.20, so that half are above
6.9k tokens and 7% above 32k, and the longest has 126,195. 39% begin with more than one block of 512 tokens that an earlier one had; of
those prompts the quantiles below lie in the cache then. Answers have 343 tokens in the mean. Requests themselves are not taken from it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

Batch = list[tuple[int, int]]

LOG_MEAN, LOG_DEVIATION, LONGEST = 8.74, 1.20, 126195
HITS, HIT_QUANTILES, HIT_PARTS = 0.39, (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0), (0.05, 0.29, 0.59, 0.85, 0.95, 0.98, 0.99)
ANSWER = 343
# New tokens that a step has at most: engines' usual limits, and what groups of GPUs are given.
BUDGETS = (2048, 8192, 16384, 32768, 65536)
# Of steps in which requests are decoded as well, and how many at most; and after each prompt that nobody else waits.
DECODING, MOST_DECODES, NOBODY_WAITS = 0.5, 64, 0.25
# Cached tokens of a step at most, for the memory of a benchmark: 2 GiB of keys and values of 8 heads of 128 in bf16.
MOST_CACHED = 2**19


@dataclass
class Traffic:
    """Steps one after another.

    Attributes:
        scale: by which all lengths are divided, to try something over small ones.
    """

    rng: np.random.Generator
    scale: int = 1
    # What is left of a prompt that did not fit: how much is cached, and what is new.
    _left: tuple[int, int] | None = field(default=None, init=False)

    def step(self) -> Batch:
        """Prompts, of which the last may be cut by the step's limit and go on in the next; and, now and then, decodes."""
        room = int(self.rng.choice(BUDGETS)) // self.scale
        batch: Batch = []
        while room > 0:
            cached, new = self._prompt() if self._left is None else self._left
            taken = min(new, room)
            batch.append((cached, taken))
            room -= taken
            self._left = (cached + taken, new - taken) if taken < new else None
            if self.rng.random() < NOBODY_WAITS:
                break
        many = int(self.rng.integers(1, MOST_DECODES + 1)) if self.rng.random() < DECODING else 0
        held = sum(cached for cached, _ in batch)
        for _ in range(many):
            context = sum(self._prompt()) + int(self.rng.integers(1, 2 * ANSWER)) // self.scale
            held += context
            if held > MOST_CACHED // self.scale:
                break
            batch.append((context, 1))
        return batch

    def _prompt(self) -> tuple[int, int]:
        """Tokens that are cached, and the others, of which there is one at least."""
        length = int(min(LONGEST, max(1, self.rng.lognormal(LOG_MEAN, LOG_DEVIATION)))) // self.scale + 1
        part = float(np.interp(self.rng.random(), HIT_QUANTILES, HIT_PARTS)) if self.rng.random() < HITS else 0.0
        cached = min(int(length * part), length - 1)
        return cached, length - cached


def serving_batches(many: int, seed: int = 0, scale: int = 1) -> list[Batch]:
    """So many steps, the same for the same arguments, and the first of them for any number."""
    traffic = Traffic(np.random.default_rng(seed), scale)
    return [traffic.step() for _ in range(many)]


def in_words(batch: Batch) -> str:
    """What a batch has: prefills with their longest prompt, cached and new tokens, and decodes."""
    prefills = [request for request in batch if request[1] > 1]
    cached, new = (sum(request[n] for request in prefills) for n in (0, 1))
    longest = max(map(sum, prefills), default=0)
    return f"{len(prefills)} prefills, {new:,} new over {cached:,}, longest {longest:,}; {len(batch) - len(prefills)} decodes"
