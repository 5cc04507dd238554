"""Whether a module is there to be imported, without importing it."""

from __future__ import annotations

from importlib.util import find_spec


def is_installed(module: str) -> bool:
    """Whether the module can be imported, as far as can be said without doing so; its parents are imported.

    >>> is_installed("math"), is_installed("there.is.no.such.module")
    (True, False)
    """
    try:
        return find_spec(module) is not None
    except ImportError:
        return False  # a parent is missing
    except ValueError:
        return True  # it has been imported, or made by hand, and has no spec
