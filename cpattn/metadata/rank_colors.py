"""A colour for each rank, that can be told apart in colour blindness: those of Okabe and Ito (jfly.uni-koeln.de/color)."""

from __future__ import annotations

# In this order neighbours differ in lightness too, which a black-and-white print keeps. Grey stands for their black.
RANK_COLORS = ("#0072B2", "#E69F00", "#009E73", "#F0E442", "#56B4E9", "#D55E00", "#CC79A7", "#595959")
# Of cached tokens, which no rank computes.
PREFIX = "#DDDDDD"


def rank_color(rank: int) -> str:
    """The rank's colour, as ``#rrggbb``; every eighth rank has the same."""
    return RANK_COLORS[rank % len(RANK_COLORS)]


def ink_on(color: str) -> str:
    """Black or white: what can be read on that colour, by its relative luminance (WCAG 2)."""
    channels = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    # Where the contrast with black and with white is the same.
    return "#000000" if luminance > 0.179 else "#FFFFFF"
