"""What is raised where a model and its context do not go together."""

from __future__ import annotations

from cpattn.errors import CPError


class ContextError(CPError):
    """A model ran, or was gathered from, outside of the context that it needs."""
