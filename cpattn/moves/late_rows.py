"""Rows in order, of which some come late: beside the attention that reads them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LateRows(NamedTuple):
    """Rows in order, of which this rank's are put there as they are sent, and others' are brought piece by piece while the attention
    runs that reads them. All tables are int32, on the device.

    Attributes:
        ordered: the memory, ``[n, Hkv, width]``, contiguous.
        own_rows: ``[rows]``: where each of this rank's rows goes; -1 for none.
        source: ``[pieces * PIECE_ROWS]``: which of all ranks' rows comes to each; -1 for those that are not brought.
        order: ``[1 + pieces]``: how many pieces have such a row, then those pieces, the first to be needed first, and then -1.
        flags: which are there; see :class:`cpattn.keys.Arrivals`.
    """

    ordered: Tensor
    own_rows: Tensor
    source: Tensor
    order: Tensor
    flags: Tensor
