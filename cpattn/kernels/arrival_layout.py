"""How it is written down what has arrived of keys; :mod:`cpattn.kernels.arrivals` says what it means. It needs no Triton."""

from __future__ import annotations

# Rows that are announced together.
PIECE_ROWS = 16
# Words of flags: the number of the turn, that number once all pieces are there, and from here on one for each piece.
FIRST_FLAG = 2
