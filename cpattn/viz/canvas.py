"""A figure to draw on, and its file: the same bytes each time it is made by the same matplotlib."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cpattn.errors import CPError
from cpattn.viz.palette import INK

SUFFIXES = (".png", ".svg", ".pdf")
FONT = "DejaVu Sans"  # comes with matplotlib

# What a reader's own matplotlib settings must not change, and what makes the files repeatable.
_SETTINGS: Any = {
    "font.family": FONT,
    "font.size": 9.0,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.titlesize": 9.0,
    "xtick.color": INK,
    "ytick.color": INK,
    "hatch.linewidth": 0.6,
    "svg.hashsalt": "cpattn",
    "svg.fonttype": "path",
    "savefig.dpi": 144,
    "savefig.facecolor": "white",
}


class PictureError(CPError):
    """A picture cannot be made: no matplotlib, a kind of file that is not known, or a place that cannot be written to."""


def need_matplotlib() -> None:
    """Raises PictureError where it cannot be imported."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise PictureError(f"drawing needs matplotlib ({error}); pip install 'cpattn[viz]'") from None


@contextmanager
def canvas(path: str | Path, width: float, height: float) -> Iterator[Any]:
    """A matplotlib Figure of that size in inches, written to ``path`` at the end. It never opens a window.

    Raises PictureError.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise PictureError(f"cannot draw to {path}: a picture's name ends in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    need_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        figure = Figure(figsize=(width, height))
        yield figure
        # Without dates or versions, which would differ from one making to the next.
        unset = {".png": ["Software"], ".svg": ["Date", "Creator"], ".pdf": ["CreationDate", "Creator", "Producer"]}[path.suffix.lower()]
        try:
            figure.savefig(path, metadata=dict.fromkeys(unset))
        except OSError as error:
            raise PictureError(f"cannot write {path}: {error.strerror}; choose a folder that exists and is yours") from None
