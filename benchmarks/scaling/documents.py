"""Documents packed into one context, as long as MagiAttention's benchmark draws them.

The counts are its file exps/dist_attn/benchmark/datasets/default/doc_length_distribution.csv, and the rules those of
exps/dist_attn/benchmark/utils.py and docs/source/blog/cp_benchmark.md, all at commit 2c6413571c2c of
https://github.com/SandAI-org/MagiAttention. What differs: pieces are drawn one by one instead of from one shuffle of them all, a pack
begins with a whole piece, and lengths are not rounded to what its transfers align to.
"""

from __future__ import annotations

import random
from itertools import chain

# First and last length of documents in tokens, and how many there are.
DOCUMENTS = {
    (0, 10): 30254,
    (11, 50): 391188,
    (51, 100): 699596,
    (101, 200): 1377757,
    (201, 500): 3794735,
    (501, 1024): 3316785,
    (1025, 2048): 2106566,
    (2049, 4096): 988525,
    (4097, 8192): 410002,
    (8193, 16384): 173574,
    (16385, 32768): 115007,
    (32769, 65536): 18428,
    (65537, 131072): 22513,
    (131073, 196608): 18284,
}
# The longest piece is this part of the pack.
LONGEST_PART = 4


def packed_documents(tokens: int, seed: int) -> list[tuple[int, int]]:
    """A pack of so many tokens: (0, length) of each document.

    A document has the middle of its range as its length. One longer than a quarter of the pack is cut into pieces of a quarter and
    what is left, and pieces are drawn by how many there are. The last one of the pack is cut.
    """
    longest = tokens // LONGEST_PART
    pieces: dict[int, int] = {}
    for (first, last), count in DOCUMENTS.items():
        whole, rest = divmod((first + last) // 2, longest)
        pieces[longest] = pieces.get(longest, 0) + whole * count
        if rest:
            pieces[rest] = pieces.get(rest, 0) + count
    rng = random.Random(seed)
    left, pack = tokens, []
    while left:
        (length,) = rng.choices(list(pieces), list(pieces.values()))
        pack.append((0, min(length, left)))
        left -= pack[-1][1]
    return pack


def in_words(packs: list[list[tuple[int, int]]]) -> str:
    """How many documents there are, and how long."""
    lengths = sorted(length for _, length in chain.from_iterable(packs))
    numbers = " + ".join(str(len(pack)) for pack in packs)
    return f"{numbers} documents of {lengths[0]:,} to {lengths[-1]:,} tokens, {lengths[len(lengths) // 2]:,} in the median"
