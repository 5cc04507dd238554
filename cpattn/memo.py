"""A dict that does not grow forever: for what is worked out once and used by every layer, of batches that never end."""

from __future__ import annotations

from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Memo(dict[K, V], Generic[K, V]):
    """What can be made anew at any time. It is read as a dict; once full it begins again from nothing, which costs less than
    to remember what was used last.

    >>> squares = Memo(most=2)
    >>> [squares.keep(n, n * n) for n in range(3)], squares
    ([0, 1, 4], {2: 4})

    Args:
        most: entries that it holds.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def keep(self, key: K, value: V) -> V:
        """Remembers the value, and returns it."""
        if len(self) >= self._most:
            self.clear()
        self[key] = value
        return value
