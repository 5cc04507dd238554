"""How wide a text is, so that it is written where it fits, and broken or left out where it does not."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from cpattn.viz.canvas import FONT, need_matplotlib

TITLE_SIZE, TEXT_SIZE = 10.5, 9.0
TITLE_TOP, CAPTION_TOP, CAPTION_STEP = 0.22, 0.45, 0.19  # inches from the picture's upper edge


@lru_cache(4096)
def text_width(text: str, size: float = TEXT_SIZE) -> float:
    """The width in inches of a text of that many points.

    Raises PictureError without matplotlib.
    """
    need_matplotlib()
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    if not text.strip():
        return 0.0
    outline = TextPath((0, 0), text, size=size, prop=FontProperties(family=FONT))
    # The font has a point wherever an outline turns back. To find such places anew, as get_extents does, took half of a picture's time.
    return float(outline.vertices[:, 0].max()) / 72


def longest_that_fits(texts: Sequence[str], inches: float, size: float) -> str:
    """The first of the texts that fits into so many inches, with a little air; "" if none does."""
    return next((text for text in texts if text_width(text, size) + 0.06 <= inches), "")


def wrapped(sentences: Sequence[str], inches: float, size: float = TEXT_SIZE) -> list[str]:
    """The sentences that are not empty one after another, in lines no wider than that; a word that is wider is shortened."""
    lines: list[str] = []
    for word in " ".join(sentence for sentence in sentences if sentence).split():
        while text_width(word, size) > inches:
            word = word.rstrip("\u2026")[:-1] + "\u2026"
        if lines and text_width(f"{lines[-1]} {word}", size) <= inches:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
