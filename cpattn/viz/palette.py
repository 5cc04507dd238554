"""What pictures are drawn with: the colours of ranks, as text and as hatches too, and those of what is not a rank.

Nothing is said by colour alone: ranks are named as well, and beyond eight, where colours come again, hatched.
"""

from __future__ import annotations

from cpattn.metadata.rank_colors import PREFIX as PREFIX
from cpattn.metadata.rank_colors import RANK_COLORS
from cpattn.metadata.rank_colors import ink_on as ink_on
from cpattn.metadata.rank_colors import rank_color as rank_color

# As text, on a background that may be white or black: a darker yellow, a lighter grey.
_TEXT_COLORS = {"#F0E442": "#B8A800", "#595959": "#8A8A8A"}
_HATCHES = ("", "////", "....", "xxxx", "\\\\\\\\", "++++", "oooo", "----")

# What is not a rank, beside cached tokens: rows that hold nothing, and ink.
PADDING, MASKED, INK, FAINT = "#FFFFFF", "#FFFFFF", "#222222", "#BBBBBB"


def rank_text_color(rank: int) -> str:
    """The rank's colour for letters in a terminal."""
    return _TEXT_COLORS.get(rank_color(rank), rank_color(rank))


def rank_hatch(rank: int) -> str:
    """The rank's hatch, in matplotlib's words: none for the first eight, another for each eight more."""
    return _HATCHES[rank // len(RANK_COLORS) % len(_HATCHES)]


def tint(color: str) -> str:
    """The colour mixed with white: work over cached keys, beside work over new ones."""
    return "#" + "".join(f"{round(255 - 0.42 * (255 - int(color[at : at + 2], 16))):02X}" for at in (1, 3, 5))
