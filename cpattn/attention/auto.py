"""Which backends can serve a call."""

from __future__ import annotations

from cpattn.attention.backend import Backend
from cpattn.attention.custom import AttentionCallable
from cpattn.attention.flash_varlen import capability
from cpattn.attention.registry import BACKENDS, find_backend
from cpattn.errors import UnsupportedError
from cpattn.problem import Problem
from cpattn.spans import Alignment

# In which order "auto" takes them on a GPU where their times are not estimated, by the major number of its compute capability. On 9 they
# mostly are; there triton has all features, and merges in its kernel. The others follow what the kernels' authors report.
_GPU_ORDERS = {
    8: ["flash_attn2", "torch_flash", "triton", "flash_attn4", "reference"],
    9: ["triton", "flash_attn3", "flash_attn4", "flash_attn2", "torch_flash", "reference"],
    10: ["flash_attn4", "triton", "flash_attn2", "torch_flash", "reference"],
}
_CPU_ORDER = ["cpu", "reference"]


def auto_order(problem: Problem) -> list[Backend]:
    """The backends for where the call's tensors lie."""
    if problem.device.type != "cuda":
        return [BACKENDS[name] for name in _CPU_ORDER]
    order = _GPU_ORDERS.get(capability(problem.device)[0], _GPU_ORDERS[max(_GPU_ORDERS)])
    return [BACKENDS[name] for name in order]


def able_backends(name: str | Backend | AttentionCallable, problem: Problem, alignments: frozenset[Alignment]) -> list[Backend]:
    """The backend of that name, or for ``"auto"`` those that can serve the call, in order; or a caller's own.

    Raises:
        UnknownNameError: there is no backend of that name.
        UnsupportedError: the named one cannot serve the call; an explicit choice never falls back.
    """
    problem = problem.attended
    if name == "auto":
        order = auto_order(problem)
        able = [backend for backend in order if backend.why_not(problem, alignments) is None]
        if not able:
            reasons = "; ".join(f"{backend.name}: {backend.why_not(problem, alignments)}" for backend in order)
            raise UnsupportedError(f"no backend can serve this call: {reasons}")
        # Memory for a copy of all pages is not for "auto" to take where a backend does without.
        readers = [
            backend for backend in able if problem.page_size is not None and backend.attends_to_pages(problem) and not backend.loops_on_host
        ]
        return readers or able
    backend = find_backend(name)
    reason = backend.why_not(problem, alignments)
    if reason:
        others = [other.name for other in auto_order(problem) if other.why_not(problem, alignments) is None]
        raise UnsupportedError(f"backend={backend.name!r} cannot serve this call: {reason}; {', '.join(map(repr, others)) or 'none'} could")
    return [backend]


def explain_backends(problem: Problem, alignments: frozenset[Alignment]) -> dict[str, str]:
    """For each backend ``"able"``, or the reason why it cannot serve the call. Those for such a device come first, in the order of
    ``"auto"``."""
    problem = problem.attended
    order = [backend.name for backend in auto_order(problem)]
    names = order + [name for name in BACKENDS if name not in order]
    return {name: BACKENDS[name].why_not(problem, alignments) or "able" for name in names}


def how_served(backend: Backend, problem: Problem) -> str:
    """What it does with pages, where there are any, and what else is to be said of it; after a comma."""
    parts, problem = [], problem.attended
    if problem.page_size is not None:
        stored, dtype = (str(x).removeprefix("torch.") for x in (problem.stored_dtype, problem.dtype))
        in_dtype = "" if stored == dtype else f" in {stored}"
        if backend.attends_to_pages(problem):
            parts.append(f"reads the pages{in_dtype}")
        else:
            parts.append(f"reads a packed copy of the pages of {problem.page_size}{in_dtype and f' in {dtype}'}")
    how = backend.how(problem)
    if how:
        parts.append(how)
    return "".join(f", {part}" for part in parts)
