"""The backends there are, and which one serves a call."""

from __future__ import annotations

from cpattn.attention import cpu, reference
from cpattn.attention.backend import Backend, Call
from cpattn.errors import UnknownNameError, UnsupportedError

# In the order in which "auto" tries them: the fastest first, the one that can do everything last.
BACKENDS: dict[str, Backend] = {module.BACKEND.name: module.BACKEND for module in (cpu, reference)}


def choose_backend(name: str, call: Call) -> Backend:
    """The backend of that name, or for ``"auto"`` the first that can serve the call.

    Raises:
        UnknownNameError: there is no backend of that name.
        UnsupportedError: the named one can not serve the call; an explicit choice never falls back.
    """
    if name == "auto":
        return next(backend for backend in BACKENDS.values() if backend.why_not(call) is None)
    if name not in BACKENDS:
        known = ", ".join(map(repr, ["auto", *BACKENDS]))
        raise UnknownNameError(f"backend={name!r} is unknown; choose one of {known}")
    reason = BACKENDS[name].why_not(call)
    if reason:
        able = [other.name for other in BACKENDS.values() if other.why_not(call) is None]
        raise UnsupportedError(f"backend={name!r} can not serve this call: {reason}; {', '.join(map(repr, able)) or 'none'} could")
    return BACKENDS[name]


def explain_choice(call: Call) -> dict[str, str]:
    """For each backend in the order of ``"auto"``: ``"chosen"``, ``"able"``, or the reason why it can not serve the call."""
    reasons = {backend.name: backend.why_not(call) or "able" for backend in BACKENDS.values()}
    for name, reason in reasons.items():
        if reason == "able":
            reasons[name] = "chosen"
            break
    return reasons
