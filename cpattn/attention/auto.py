"""Which backend serves a call, and in which order ``"auto"`` tries them."""

from __future__ import annotations

from typing import NamedTuple

from cpattn.attention.backend import Backend
from cpattn.attention.custom import AttentionCallable
from cpattn.attention.flash_varlen import capability
from cpattn.attention.registry import BACKENDS, find_backend
from cpattn.errors import UnsupportedError
from cpattn.problem import Problem
from cpattn.spans import Alignment

# In which order "auto" tries them on a GPU, by the major number of its compute capability: the fastest first.
# They follow what the kernels' authors report, until someone measures them here.
_GPU_ORDERS = {
    8: ["flash_attn2", "torch_flash", "triton", "flash_attn4", "reference"],
    10: ["flash_attn4", "triton", "flash_attn2", "torch_flash", "reference"],
}
# On 9 (H100, H200) no backend is the fastest at everything. What the quotients are of: benchmarks/results/backends_gpu_fa3.md,
# backends_gpu_fa4.md and backends_gpu_merging.md, times as graphs, of flash_attn3 or flash_attn4 to those of triton.
_HOPPER_ORDERS = {
    # flash_attn3 0.20 to 1.14, as it splits long spans (above 1 where results are merged as well); flash_attn4 1.03 to 3.05.
    "decoding": ["flash_attn3", "triton", "flash_attn4", "flash_attn2", "torch_flash", "reference"],
    # flash_attn3 1.02 to 1.53, flash_attn4 1.02 to 1.74: triton merges partial results in its kernel, others in a pass of their own.
    "merging": ["triton", "flash_attn3", "flash_attn4", "flash_attn2", "torch_flash", "reference"],
    # flash_attn3 1.01 to 1.50, as it needs a pass over its result; flash_attn4 0.95.
    "long with sinks": ["flash_attn4", "triton", "flash_attn3", "flash_attn2", "torch_flash", "reference"],
    # flash_attn3 1.14 to 2.16; flash_attn4 0.79 to 1.33, and of the host's time 3 times as much.
    "sinks": ["triton", "flash_attn4", "flash_attn3", "flash_attn2", "torch_flash", "reference"],
    # flash_attn3 1.06 to 1.07, flash_attn4 1.00 to 2.22.
    "pages": ["triton", "flash_attn3", "flash_attn4", "flash_attn2", "torch_flash", "reference"],
    # Of whole calls over the memory of peers; see LATE_FLOPS_A_BYTE.
    "long, keys late": ["triton", "flash_attn3", "flash_attn4", "flash_attn2", "torch_flash", "reference"],
    # flash_attn3 0.95 to 0.97, flash_attn4 0.95 to 0.97.
    "long": ["flash_attn3", "flash_attn4", "triton", "flash_attn2", "torch_flash", "reference"],
    # flash_attn3 0.81 to 0.85, flash_attn4 up to 1.42, and of the host's time 3 times as much.
    "short": ["flash_attn3", "triton", "flash_attn4", "flash_attn2", "torch_flash", "reference"],
}
_CPU_ORDER = ["cpu", "reference"]
# A batch is long from so many new tokens a request and query-key pairs on, on a rank in the mean: those of a prompt of 4k. With fewer
# pairs the launch takes less than the host's time for one of flash_attn4 (140 us); with fewer tokens its tiles are not full.
LONG_TOKENS = 1024
LONG_PAIRS = 2**23
# Without a bucket a call is likely to be eager, and the host's time for one of flash_attn4 (649 us beside 359 of triton, between two
# H100) not hidden before so many pairs: of a prompt of 8k over 2 ranks flash_attn4 took 1.22 times as long as triton, and 0.96 as a
# graph (benchmarks/results/peers_2_gpus.md).
EAGER_LONG_PAIRS = 3 * 2**23
# triton attends while keys of other ranks still come, and others begin when all are there. A byte takes 2.5 ps to come between two H100
# (400 GB/s), and others gain 4% of attention at 600 TFLOP/s: what comes late decides up to so much attention a byte.
LATE_FLOPS_A_BYTE = 2.5e-12 / 0.04 * 600e12
# What a byte of a packed prefix that others have copied in order counts: a copy is faster than the links between GPUs.
COPIED_BYTE = 1 / 3


class Workload(NamedTuple):
    """What a schedule makes of a problem and a plan, as far as the choice of a backend goes by it; the same on every rank.

    Attributes:
        alignments: of the spans that the hops will have.
        merges: whether there is more than one result for a query.
        decodes: whether each request has a few new tokens at most.
        new_tokens: of a request, and pairs: of queries and keys, both on a rank and in the mean.
        late_bytes: of keys that come to a rank before or beside its only launch; a packed prefix that may have to be copied counts
            :data:`COPIED_BYTE` each.
    """

    alignments: frozenset[Alignment]
    merges: bool = False
    decodes: bool = False
    new_tokens: int = 0
    pairs: int = 0
    late_bytes: int = 0


def auto_order(problem: Problem, workload: Workload) -> list[Backend]:
    """The backends in the order in which ``"auto"`` tries them where the call's tensors lie."""
    if problem.device.type != "cuda":
        return [BACKENDS[name] for name in _CPU_ORDER]
    major = capability(problem.device)[0]
    order = _HOPPER_ORDERS[_kind(problem, workload)] if major == 9 else _GPU_ORDERS.get(major, _GPU_ORDERS[max(_GPU_ORDERS)])
    return [BACKENDS[name] for name in order]


def _kind(problem: Problem, workload: Workload) -> str:
    """What decides the order on compute capability 9; it follows from the plan and the arguments, so alike on every rank."""
    if workload.decodes:
        return "decoding"
    if workload.merges:
        return "merging"
    long_pairs = LONG_PAIRS if problem.fixed else EAGER_LONG_PAIRS
    is_long = problem.page_size is None and workload.new_tokens >= LONG_TOKENS and workload.pairs >= long_pairs
    if problem.sinks:
        return "long with sinks" if is_long else "sinks"
    if problem.page_size is not None:
        return "pages"
    if not is_long:
        return "short"
    flops = 4 * workload.pairs * problem.q_heads * problem.head_dim
    return "long, keys late" if flops < workload.late_bytes * LATE_FLOPS_A_BYTE else "long"


def choose_backend(name: str | Backend | AttentionCallable, problem: Problem, workload: Workload) -> Backend:
    """The backend of that name, or for ``"auto"`` the first that can serve the call; or a caller's own.

    Raises:
        UnknownNameError: there is no backend of that name.
        UnsupportedError: the named one cannot serve the call; an explicit choice never falls back.
    """
    if name == "auto":
        able = [backend for backend in auto_order(problem, workload) if backend.why_not(problem, workload.alignments) is None]
        if not able:
            reasons = "; ".join(
                f"{backend.name}: {backend.why_not(problem, workload.alignments)}" for backend in auto_order(problem, workload)
            )
            raise UnsupportedError(f"no backend can serve this call: {reasons}")
        # A copy of all pages costs more than any of the faster kernels would gain, where there are few queries.
        readers = [
            backend for backend in able if problem.page_size is not None and backend.reads_pages(problem) and not backend.loops_on_host
        ]
        return (readers or able)[0]
    backend = find_backend(name)
    reason = backend.why_not(problem, workload.alignments)
    if reason:
        others = [other.name for other in auto_order(problem, workload) if other.why_not(problem, workload.alignments) is None]
        raise UnsupportedError(f"backend={backend.name!r} cannot serve this call: {reason}; {', '.join(map(repr, others)) or 'none'} could")
    return backend


def explain_choice(problem: Problem, workload: Workload) -> dict[str, str]:
    """For each backend ``"chosen"``, ``"able"``, or the reason why it cannot serve the call. They are in the order of
    ``"auto"``, and after those come the ones that are not for such a device."""
    order = [backend.name for backend in auto_order(problem, workload)]
    names = order + [name for name in BACKENDS if name not in order]
    reasons = {name: BACKENDS[name].why_not(problem, workload.alignments) or f"able{_how(BACKENDS[name], problem)}" for name in names}
    chosen = choose_backend("auto", problem, workload)
    kind = (
        f", the order is that for {_kind(problem, workload)}"
        if problem.device.type == "cuda" and capability(problem.device)[0] == 9
        else ""
    )
    return reasons | {chosen.name: f"chosen{_how(chosen, problem)}{kind}"}


def _how(backend: Backend, problem: Problem) -> str:
    """What it does with pages, where there are any, and what else is to be said of it."""
    parts = []
    if problem.page_size is not None:
        parts.append("reads the pages" if backend.reads_pages(problem) else f"reads a packed copy of the pages of {problem.page_size}")
    how = backend.how(problem)
    if how:
        parts.append(how)
    return "".join(f", {part}" for part in parts)
