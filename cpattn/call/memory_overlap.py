"""Whether views of memory have an element in common, by their addresses, sizes and strides alone, on any device."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.exceptions import TooHardError
from torch import Tensor

# Candidate solutions that numpy may try. Layouts of caches need a handful; the general problem is NP-hard. (numpy's own
# annotation knows -1 and 0 alone.)
_MOST_WORK: Any = 10_000


def share_elements(x: Tensor, y: Tensor) -> bool:
    """Whether some byte belongs to an element of both: exact for all strides.

    >>> import torch
    >>> pool = torch.zeros(8, 2, 16)
    >>> share_elements(pool[:, 0], pool[:, 1]), share_elements(pool[:, 0], pool[3:])
    (False, True)

    Strides made up so that the search takes too long count as having none in common.
    """
    # As a rule each has memory of its own.
    one, other = x.untyped_storage(), y.untyped_storage()
    first, second = one.data_ptr(), other.data_ptr()
    if first + one.nbytes() <= second or second + other.nbytes() <= first:
        return False
    return _meet(_bytes_of(x), _bytes_of(y))


def overlaps_itself(x: Tensor) -> bool:
    """Whether two indices lead to the same element, as in an expanded view or in overlapping windows.

    >>> import torch
    >>> overlaps_itself(torch.zeros(3, 1).expand(3, 2)), overlaps_itself(torch.zeros(3, 2).t())
    (True, False)
    """
    if x.is_contiguous() or not x.numel():
        return False
    view = _bytes_of(x)
    while view.ndim:
        # Of two such indices, take the first axis in which they differ. Both can be moved along, until the axes before it are
        # 0 in both, and the axis itself is 0 in one of them.
        if _meet(view[:1], view[1:]):
            return True
        view = view[0, ...]
    return False


def _meet(x: npt.NDArray[np.void], y: npt.NDArray[np.void]) -> bool:
    try:
        return np.shares_memory(x, y, max_work=_MOST_WORK)
    except TooHardError:
        return False


class _Memory:
    """A tensor's addresses in the form that numpy takes."""

    def __init__(self, x: Tensor) -> None:
        size = x.element_size()
        self.__array_interface__ = {
            "version": 3,
            "data": (x.data_ptr(), True),
            "typestr": f"|V{size}",
            "shape": tuple(x.shape),
            "strides": tuple(map(size.__mul__, x.stride())),
        }


def _bytes_of(x: Tensor) -> npt.NDArray[np.void]:
    """A numpy array at the same addresses. Nobody reads it, so that they may be a GPU's."""
    return np.asarray(_Memory(x))
