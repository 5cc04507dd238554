"""How it is written down what has arrived of keys; :mod:`cpattn.kernels.arrivals` says what it means. It needs no Triton."""

from __future__ import annotations

# Rows that are announced together: few, so that of a short message each program brings some at once.
PIECE_ROWS = 4
# Words of flags: the number of the turn, that number once all pieces are there, and from here on one for each piece. They are read two at
# a time.
FIRST_FLAG = 2


def flag_words(pieces: int) -> int:
    """How many words flags of so many pieces have.

    >>> flag_words(3)
    6
    """
    return FIRST_FLAG + pieces + pieces % 2
