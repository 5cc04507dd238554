"""The version, in a module without imports, so that building a package needs none."""

__version__ = "0.1.0"
"""The version of cpattn, as in its package metadata."""
