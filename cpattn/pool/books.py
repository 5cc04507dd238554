"""Which pages of a KVPool are free, and how many requests use each of the others."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from cpattn.device_tables import IntArray
from cpattn.errors import PoolFullError
from cpattn.metadata.chunks import RANK


class Inherited(NamedTuple):
    """A step whose tokens a request was forked from, and the first of them."""

    number: int
    first: int


@dataclass
class CachedRequest:
    """What the pool knows of a request.

    Attributes:
        held: ``[holders]`` how many of its tokens each holder has. It is never written to: a request that changes gets another one.
        pages: of each holder, in order: as many as its tokens need, in arrays, which a page table copies as they are.
        length: its tokens, over all holders.
        owners: the rank that holds each token, where a rank keeps what it has computed; else no one's, as the length says who holds what.
            It is never written to either, and a step copies it, so it takes two bytes a token.
        inherited: steps that cannot be undone as long as it has tokens of theirs.
    """

    held: IntArray
    pages: list[array[int]]
    length: int = 0
    owners: IntArray = field(default_factory=lambda: np.empty(0, dtype=RANK))
    inherited: list[Inherited] = field(default_factory=list)


def no_pages() -> array[int]:
    return array("i")


class PageBooks:
    """The books of every holder's pages, kept alike on every rank. A holder is a rank of a sharded cache; of a replicated one,
    the one holder stands for all ranks.

    Attributes:
        free: numbers of each holder's free pages; the last is taken first.
        uses: how many requests have each of the others.
        takes: how often each page was taken: whether it is still what it was at some time.
    """

    def __init__(self, holders: int, num_pages: int) -> None:
        self.free = [list(range(num_pages))[::-1] for _ in range(holders)]
        self.uses: list[Counter[int]] = [Counter() for _ in range(holders)]
        self.takes: list[Counter[int]] = [Counter() for _ in range(holders)]

    def require(self, needed: IntArray, page_size: int, what: str) -> None:
        """Raises PoolFullError if some holder has fewer free pages than it needs."""
        for holder, (count, free) in enumerate(zip(needed.tolist(), map(len, self.free), strict=True)):
            if count > free:
                where = f" on rank {holder}" if len(self.free) > 1 else ""
                raise PoolFullError(
                    f"{what} need {count} pages of {page_size} tokens{where}, but {free} are free; release requests, or give fewer "
                    "new tokens"
                )

    def to_copy(self, holder: int, written: Iterable[tuple[int, int]]) -> dict[int, int]:
        """Which requests of a step have to copy the page that they would write to, as others use it too.

        Args:
            written: places of requests in the step, each with the part-filled page that its new tokens go to.

        Returns:
            These pages, by the request's place. Of requests that share a page among themselves alone, the last keeps it.
        """
        copies: dict[int, int] = {}
        turned: Counter[int] = Counter()  # how many of the requests before have turned to a copy
        for line, page in written:
            if self.uses[holder][page] - turned[page] > 1:
                copies[line] = page
                turned[page] += 1
        return copies

    def take(self, holder: int) -> int:
        page = self.free[holder].pop()
        self.uses[holder][page] = 1
        self.takes[holder][page] += 1
        return page

    def share(self, holder: int, pages: Iterable[int]) -> None:
        self.uses[holder].update(pages)

    def give_back(self, holder: int, pages: Iterable[int]) -> None:
        """One request has no use for these pages any more. Those that no other one uses are free; the last is taken first."""
        for page in pages:
            self.uses[holder][page] -= 1
            if not self.uses[holder][page]:
                del self.uses[holder][page]
                self.free[holder].append(page)
