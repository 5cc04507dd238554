"""A kernel through all that strategies will ask of it, and a table of what holds."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from cpattn.attention.backend import Backend
from cpattn.attention.custom import AttentionCallable
from cpattn.attention.merge import merge_
from cpattn.attention.registry import find_backend
from cpattn.attention.returned import check_returned
from cpattn.errors import BackendError, OptionError
from cpattn.metadata.devices import parse_device
from cpattn.problem import Problem
from cpattn.spans import Spans
from cpattn.testing.judge import Trial, spans_attention, why_wrong
from cpattn.testing.scenarios import SCENARIOS, Scenario, make_trial

Verdict: TypeAlias = Literal["holds", "fails", "refuses", "not claimed"]

_WIDTH = 100
# In which order a dtype is looked for that the kernel takes.
_DTYPES = {"cpu": (torch.float32, torch.bfloat16, torch.float16, torch.float64)}
_GPU_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class CheckedScenario(NamedTuple):
    """One line of a report.

    Attributes:
        name: of the scenario.
        verdict: "holds"; "fails", by a wrong result; "refuses", by an exception; or "not claimed", by the backend's flags.
        detail: why, and by how much; empty where it holds.
        passes: whether nothing is wrong: kernels may refuse what they have no flag for.
    """

    name: str
    verdict: Verdict
    detail: str
    passes: bool


@dataclass(frozen=True)
class BackendReport:
    """What :func:`check_backend` has found; ``print`` it for a table.

    Attributes:
        backend, device, dtype: what was checked.
        rows: a line for each scenario: ``name``, ``verdict`` ("holds", "fails", "refuses" or "not claimed"), ``detail``, and
            ``passes``: whether that is as it should be, as a kernel may refuse what it has no flag for.
    """

    backend: str
    device: str
    dtype: torch.dtype
    rows: tuple[CheckedScenario, ...]

    @property
    def ok(self) -> bool:
        """Whether the backend does what it claims, and claims something."""
        return all(row.passes for row in self.rows) and any(row.verdict == "holds" for row in self.rows)

    def __str__(self) -> str:
        counts = Counter(row.verdict for row in self.rows)
        found = ", ".join(f"{counts[verdict]} {verdict}" for verdict in ("holds", "fails", "refuses", "not claimed") if counts[verdict])
        dtype = str(self.dtype).removeprefix("torch.")
        lines = [f"backend={self.backend!r} on {self.device} in {dtype}: {'ok' if self.ok else 'NOT ok'} ({found})"]
        names = max(len(row.name) for row in self.rows)
        for row in self.rows:
            begin = f"  {row.name:<{names}}  {row.verdict:<11}  "
            lines += textwrap.wrap(begin + " ".join(row.detail.split()), _WIDTH, subsequent_indent=" " * len(begin)) or [begin]
        return "\n".join(line.rstrip() for line in lines)


def check_backend(
    backend: str | Backend | AttentionCallable, device: torch.device | str = "cpu", *, dtype: torch.dtype | None = None
) -> BackendReport:
    """Runs a kernel through what strategies will ask of it, and says what holds.

    Each result is compared with plain attention in float64, by a tolerance that follows from rounding alone. On a GPU fp32
    may be multiplied as TF32. Meanwhile torch has one thread on the CPU.

    >>> report = check_backend("reference")
    >>> report.ok
    True
    >>> report.rows[0].name, report.rows[0].verdict
    ('one request, causal', 'holds')

    Args:
        backend: what ``backend=`` takes: a name, a :class:`Backend`, or a function as :func:`cpattn.custom_backend` has it.
        device: where the kernel runs.
        dtype: of q, k and v; by default one that the kernel takes, bf16 on a GPU and fp32 on a CPU if it can.

    Raises:
        OptionError: ``"auto"`` was passed, which is a choice and no kernel.
        UnknownNameError: there is no backend of that name.
        CPError: this machine has no such device.
    """
    if isinstance(backend, str) and backend == "auto":
        raise OptionError("backend='auto' is a choice among kernels; pass the one that is to be checked")
    parse_device(device)
    backend, device = find_backend(backend), torch.device(device)
    if dtype is None:
        order = _DTYPES.get(device.type, _GPU_DTYPES)
        dtype = next((known for known in order if known in backend.dtypes), order[0])
    with _one_thread():
        rows = tuple(_check(backend, scenario, device, dtype) for scenario in SCENARIOS)
    return BackendReport(backend.name, str(device), dtype, rows)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Thousands of tiny operations on a CPU gain nothing from a second thread, and on a busy machine each waits for it. The
    reference took 1.2 s with one thread and 14 to 41 s with two, on two cores that others used as well."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _check(backend: Backend, scenario: Scenario, device: torch.device, dtype: torch.dtype) -> CheckedScenario:
    trial = make_trial(scenario, device, dtype)
    reason = _not_claimed(backend, scenario, trial)
    if reason:
        return CheckedScenario(scenario.name, "not claimed", reason, True)
    truth = spans_attention(trial)
    is_cuda = device.type == "cuda"
    try:
        # Kernels are launched on the current device, and what they do wrong is raised at the latest when they are waited for.
        with torch.cuda.device(trial.q.device) if is_cuda else nullcontext():
            out, lse = _result(backend, scenario, trial)
            if is_cuda:
                torch.cuda.synchronize()
    except BackendError as error:
        return CheckedScenario(scenario.name, "fails", str(error), False)
    except Exception as error:
        return CheckedScenario(scenario.name, "refuses", f"{type(error).__name__}: {error}", scenario.may_refuse)
    wrong = why_wrong(trial, truth, out, lse)
    return CheckedScenario(scenario.name, "fails" if wrong else "holds", wrong or "", not wrong)


def _not_claimed(backend: Backend, scenario: Scenario, trial: Trial) -> str | None:
    """The reason, from the backend's own description, why it is not asked for this."""
    launches = trial.parts or [trial.spans]
    problem = Problem(
        device=trial.q.device,
        dtype=trial.q.dtype,
        rows=trial.q.shape[0],
        q_heads=trial.q.shape[1],
        kv_heads=trial.keys.k.shape[-2],
        head_dim=scenario.dims[0],
        v_head_dim=scenario.dims[1],
        window=scenario.window,
        softcap=scenario.softcap,
        sinks=scenario.sinks,
        cache=None if scenario.page_size is None else "paged",
        page_size=scenario.page_size,
        fixed=scenario.fixed,
        kv_dtype=None if scenario.scales is None else trial.keys.k.dtype,
        scales=scenario.scales,
    )
    reason = backend.why_not(problem, frozenset(spans.alignment for spans in launches))
    if reason:
        return reason
    if scenario.sinks and not backend.native_sinks:
        return "it has no sinks; they are applied to its result"
    if scenario.page_size is not None and not backend.reads_pages(problem):
        return f"it reads no pages of {scenario.page_size}, and is given a packed copy"
    if scenario.scales is not None and not backend.reads_stored(problem):
        return "it reads no keys in fp8, and is given a copy in q's dtype"
    if scenario.fp32_out and not backend.fp32_out:
        return "it returns its result in q's dtype"
    if scenario.accumulate and backend.accumulate is None:
        return "it has no accumulate; its results are merged for it"
    if scenario.nan_key is not None and not backend.propagates_nan:
        return "it may give another LSE than NaN where scores are NaN"
    return None


def _result(backend: Backend, scenario: Scenario, trial: Trial) -> tuple[Tensor, Tensor]:
    """What the kernel makes of the trial, in one launch or merged from several."""
    precise = torch.promote_types(trial.q.dtype, torch.float32)
    if not trial.parts:
        return _launch(backend, trial, trial.spans, precise if scenario.fp32_out else trial.q.dtype)
    first, *others = trial.parts
    out_dtype = precise if backend.fp32_out else trial.q.dtype
    out, lse = _launch(backend, trial, first, out_dtype)
    out = out.to(precise)
    for spans in others:
        if scenario.accumulate:
            assert backend.accumulate is not None  # it is claimed
            backend.accumulate(trial.q, trial.keys, spans, trial.options, out, lse)
        else:
            merge_(out, lse, *_launch(backend, trial, spans, out_dtype))
    return out, lse


def _launch(backend: Backend, trial: Trial, spans: Spans, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    q, keys, _, options, _ = trial
    out, lse = check_returned(backend.name, backend.attend(q, keys, spans, options, out_dtype), q, keys.v)
    if out.dtype != out_dtype:
        raise BackendError(f"backend={backend.name!r} returned out in {out.dtype}, where it was asked for {out_dtype}; convert it")
    return out, lse
