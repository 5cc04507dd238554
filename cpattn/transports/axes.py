"""The axes of a group whose ranks are laid out in two dimensions or more, the last axis innermost."""

from __future__ import annotations

from math import prod
from typing import Any

from cpattn.errors import GroupError, OptionError, shown
from cpattn.metadata.batch import is_integer


def ranks_of_axes(rank: int, size: int, sizes: tuple[Any, ...]) -> list[tuple[int, ...]]:
    """For each axis the ranks that differ from ``rank`` in that coordinate only, itself among them, in ascending order.

    >>> ranks_of_axes(4, 6, (2, 3))
    [(1, 4), (3, 4, 5)]

    Raises OptionError for what are no sizes, GroupError where they do not multiply to the size of the group.
    """
    if not sizes or not all(is_integer(n) and n >= 1 for n in sizes):
        raise OptionError(f"split({', '.join(map(shown, sizes))}): pass the number of ranks along each axis, integers of at least 1")
    if prod(sizes) != size:
        raise GroupError(
            f"split({', '.join(map(str, sizes))}) asks for {prod(sizes)} ranks, but the group has {size}; the sizes of its axes "
            f"must multiply to {size}"
        )
    axes = []
    stride = size
    for n in sizes:
        stride //= n
        first = rank - rank // stride % n * stride
        axes.append(tuple(range(first, first + n * stride, stride)))
    return axes
