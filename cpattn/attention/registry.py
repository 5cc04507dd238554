"""The backends there are, by name."""

from __future__ import annotations

from cpattn.attention import cpu, flash_attn2, flash_attn3, flash_attn4, reference, torch_flash, triton
from cpattn.attention.backend import Backend
from cpattn.attention.custom import AttentionCallable, as_callers, custom_backend
from cpattn.errors import UnknownNameError

BACKENDS: dict[str, Backend] = {
    module.BACKEND.name: module.BACKEND for module in (flash_attn4, flash_attn3, flash_attn2, torch_flash, triton, cpu, reference)
}
"""What ``backend=`` takes by name: each :class:`Backend`, with what it can do as attributes. ``"auto"`` is the fastest of
them that can serve a call; :func:`cpattn.explain` says which that is, and why not the others."""


def find_backend(name: str | Backend | AttentionCallable) -> Backend:
    """The backend of that name, or a caller's own, whose results are checked; raises UnknownNameError if it is neither."""
    if isinstance(name, Backend):
        # By identity: a copy of one of ours with another ``attend`` is the caller's.
        return name if name.callers or any(name is ours for ours in BACKENDS.values()) else as_callers(name)
    if isinstance(name, str):
        if name in BACKENDS:
            return BACKENDS[name]
    elif callable(name):
        return custom_backend(name)
    known = ", ".join(map(repr, ["auto", *BACKENDS]))
    raise UnknownNameError(f"backend={name!r} is unknown; choose one of {known}, or pass a function (q, k, v, rows, **options)")
