"""Rows in order, of which some come late: beside the attention that reads them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LateRows(NamedTuple):
    """Where rows of a message go that each rank has in an order of its own: this rank's as it posts them, and others' from their messages,
    piece by piece, while the attention runs that reads them. All tables are int32, on the device.

    Attributes:
        rows: of this rank.
        own_rows: ``[1 + n]``: how many of these go to the message, then those; places: ``[n]``: the row of the message that each of them
            goes to. Nobody reads the others there.
        source: ``[pieces * PIECE_ROWS]``: which row of all ranks' messages, rank after rank, comes to each row of the pieces in ``order``;
            -1 for those that are not brought.
        order: ``[1 + pieces]``: how many pieces have a row of others, then those pieces, the first to be needed first, and then -1.
        flags: which are there; see :class:`cpattn.keys.Arrivals`.
        form: of that order, which all ranks' have; see :class:`cpattn.transports.posted.Posted`.
        side_by_side: whether they come by programs that run on the multiprocessors of the attention; see
            :class:`cpattn.keys.Arrivals`.
        between: whether cached keys are put in rows of the message after this rank's own, and before others' come.
    """

    rows: int
    own_rows: Tensor
    places: Tensor
    source: Tensor
    order: Tensor
    flags: Tensor
    form: int
    side_by_side: bool = False
    between: bool = False
