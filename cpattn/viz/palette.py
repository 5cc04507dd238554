"""A colour for each rank, that can be told apart in colour blindness: those of Okabe and Ito (jfly.uni-koeln.de/color).

Nothing is said by colour alone: ranks are named as well, and beyond eight, where colours come again, hatched.
"""

from __future__ import annotations

# In this order neighbours differ in lightness too, which a black-and-white print keeps. Grey stands for their black.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#F0E442", "#56B4E9", "#D55E00", "#CC79A7", "#595959")
# As text, on a background that may be white or black: a darker yellow, a lighter grey.
_TEXT_COLORS = {"#F0E442": "#B8A800", "#595959": "#8A8A8A"}
_HATCHES = ("", "////", "....", "xxxx", "\\\\\\\\", "++++", "oooo", "----")

# What is not a rank: cached tokens, rows that hold nothing, and ink.
PREFIX, PADDING, MASKED, INK, FAINT = "#DDDDDD", "#FFFFFF", "#FFFFFF", "#222222", "#BBBBBB"


def rank_color(rank: int) -> str:
    """The rank's colour, as ``#rrggbb``; every eighth rank has the same."""
    return _COLORS[rank % len(_COLORS)]


def rank_text_color(rank: int) -> str:
    """The rank's colour for letters in a terminal."""
    return _TEXT_COLORS.get(rank_color(rank), rank_color(rank))


def rank_hatch(rank: int) -> str:
    """The rank's hatch, in matplotlib's words: none for the first eight, another for each eight more."""
    return _HATCHES[rank // len(_COLORS) % len(_HATCHES)]


def ink_on(color: str) -> str:
    """Black or white: what can be read on that colour, by its relative luminance (WCAG 2)."""
    channels = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    # Where the contrast with black and with white is the same.
    return "#000000" if luminance > 0.179 else "#FFFFFF"


def tint(color: str) -> str:
    """The colour mixed with white: work over cached keys, beside work over new ones."""
    return "#" + "".join(f"{round(255 - 0.42 * (255 - int(color[at : at + 2], 16))):02X}" for at in (1, 3, 5))
