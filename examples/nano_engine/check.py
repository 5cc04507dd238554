"""Whether two engines give the same tokens, and how near those that differ were to being the same."""

from __future__ import annotations

from collections.abc import Sequence

from nano_engine.serve import Answer, Request, random_tokens


def requests_to_check(vocab: int, longest: int) -> list[Request]:
    """Prompts of awkward lengths, some of which begin alike: in one step, and later, when the beginning is cached.

    Arrivals are in steps.
    """
    page = 256
    shared = random_tokens(0, 2 * page, vocab)

    def request(length: int, arrival: int, begins: list[int] | None = None) -> Request:
        own = random_tokens(1000 * arrival + length, length, vocab)
        return Request([*(begins or []), *own], new_tokens=8 + length % 5, arrival=arrival)

    return [
        *(request(length, 0) for length in (1, 2, 5, page - 1, page, page + 1, 613)),
        request(37, 0, shared),
        request(101, 0, shared),
        request(1, 3, shared),
        request(3, 3, shared[:page]),
        request(450, 3),
        request(64, 5, shared),
        request(longest, 5),
    ]


def compare(requests: Sequence[Request], own: Sequence[Answer], mine: Sequence[Answer], dtype: str) -> bool:
    """Prints how many tokens are equal; whether they are as they should be.

    In float32 all of them have to be. In bf16 an engine differs from itself in another order of sums: a request may go another
    way where its two largest logits were as near as that. After it its tokens are those of another text, and are not compared.
    """
    equal = compared = 0
    error = 0.0
    gaps = []
    for one, other in zip(own, mine, strict=True):
        for token, mine_token, top, mine_top in zip(one.tokens, other.tokens, one.tops, other.tops, strict=True):
            compared += 1
            if token != mine_token:
                gaps.append(top[0] - top[1])
                break
            equal += 1
            error = max(error, *(abs(a - b) for a, b in zip(top, mine_top, strict=True)))
    total = sum(len(one.tokens) for one in own)
    largest = max(abs(top[0]) for one in own for top in one.tops)
    nearest = min(top[0] - top[1] for one in own for top in one.tops)
    lengths = sorted(len(request.prompt) for request in requests)
    print(f"  {equal} of {total} tokens of {len(own)} prompts of {lengths[0]} to {lengths[-1]} tokens equal the engine's own on one device")
    print(f"  largest difference of a logit {error:.1e}, of {largest:.0f}; the two largest of a token are {nearest:.1e} apart or more")
    if gaps:
        print(f"  {len(gaps)} requests differ from some token on, where the engine's own logits were {max(gaps):.1e} apart at most")
    if dtype == "float32":
        return equal == total
    # Each of the two may have moved by the error, towards each other.
    return compared > total // 2 and all(gap <= 2 * error for gap in gaps)
