"""Where the words of a heap lie, by which ranks tell each other what they have posted and read; :mod:`cpattn.kernels.peer_flags` says
what they mean. It needs no Triton."""

from __future__ import annotations

MOST_RANKS = 16
# Messages that one call can have in memory.
BOARDS = 32
WORD_BYTES = 4

# One of each. FAULT and LIMIT are read as one of 64 bits.
FAULT = 0
LIMIT = 1
WAITING = 2
ALL_READ = 3
# By which its own rank and the others know it as this one.
SEAL = 4
# One for each board.
POSTS = 16
POSTED = POSTS + BOARDS
PULLED = POSTED + BOARDS
MAY_POST = PULLED + BOARDS
MAY_PULL = MAY_POST + BOARDS
# Of 64 bits, one for each board and rank: READY, then READ, each BOARDS * ranks of them. The number of a post is in the upper half, and
# in the lower one of READY the size of the message.
READY = MAY_PULL + BOARDS
WORDS = READY + 2 * 2 * BOARDS * MOST_RANKS

# A fault is 1 + the rank that did not come, or this + the rank that has posted another message than was expected.
OTHER_MESSAGE = 1000
