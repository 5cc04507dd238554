"""What the release of Triton decides: whether the attention kernel for Hopper is used, and whether launches skip Triton.

Both rest on parts of Triton that change from release to release: Gluon, in which that kernel is written, is experimental,
and how a compiled kernel is launched is internal. This is the one gate. On releases that are known, :data:`KNOWN` says what
works. With a newer one, a check that belongs to what is used finds out at first use. Where one of them is off, something
slower that is right takes its place, with a warning.
"""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from typing import NamedTuple

import torch

from cpattn.current import is_capturing
from cpattn.kernels.cuda_driver import why_missing

Release = tuple[int, int]
# Triton fuses multiplications and additions by default, and from 3.10 on it does not: results would have other bits, and take longer.
COMPILER_OPTIONS = {"enable_fp_fusion": True}


class SlowKernelWarning(UserWarning):
    """Backend ``triton`` runs slower than this GPU could; the message says why, and what to do."""


class Known(NamedTuple):
    """What works with a release of Triton: None, or the reason why it does not.

    Attributes:
        hopper_kernel: the attention kernel for Hopper.
        direct_launch: launches by the CUDA driver's function.
    """

    hopper_kernel: str | None = None
    direct_launch: str | None = None


# Releases that were tried on a Hopper GPU; their speed: benchmarks/results/triton_releases.md, which says as well why long prompts
# took 2 to 3% longer with 3.9 than with 3.6, far less than with the plain kernel.
# torch 2.9 ships 3.5, 2.10 and 2.11 3.6, 2.13 3.7, 2.14 3.8.
KNOWN: dict[Release, Known] = {
    (3, 5): Known(hopper_kernel="its Gluon has another form of warp_specialize"),
    (3, 6): Known(),
    (3, 7): Known(),
    (3, 8): Known(),
    (3, 9): Known(),
}


class Verdict(NamedTuple):
    """Whether something is used, and why.

    Attributes:
        used: None where the self-check has not been run yet.
        why: a clause without a full stop.
    """

    used: bool | None
    why: str


class Gate:
    """Whether one of the two fast ways is taken with this release of Triton.

    Args:
        known: for each release that is known None, or the reason why the way is not taken.
        check: what finds out on a newer one, on a device: None if all is right, or what is not. Set by the module that takes
            the way, before it asks.
        precondition: a reason that has nothing to do with Triton, or None.
        release: by default that of the Triton that is installed; None where kernels are interpreted.
    """

    def __init__(
        self,
        known: Mapping[Release, str | None],
        check: Callable[[torch.device], str | None] = lambda device: "there is nothing that could check it",
        precondition: Callable[[], str | None] = lambda: None,
        release: Callable[[], Release | None] | None = None,
    ) -> None:
        self._known = known
        self.check = check
        self._precondition = precondition
        self._release = release or (lambda: running_release())
        self._verdict: Verdict | None = None
        self._lock = threading.RLock()
        self._is_checking = False

    def verdict(self) -> Verdict:
        """What is known now; asks no device."""
        if self._verdict is None:
            verdict = self._first_verdict()
            if verdict.used is None:
                return verdict
            self._verdict = verdict
        return self._verdict

    def is_open(self, device: torch.device) -> bool:
        """Whether the fast way is taken on a device. On a release that is not known, the first call checks; while a graph
        captures, nothing can be checked, and the answer is no until the next call."""
        verdict = self.verdict()
        if verdict.used is not None:
            return verdict.used
        with self._lock:
            # The check itself asks, too.
            if self._is_checking:
                return True
            if self._verdict is None:
                if is_capturing(device):
                    return False
                self._verdict = self._checked(device)
            return bool(self._verdict.used)

    def _first_verdict(self) -> Verdict:
        try:
            release = self._release()
        except ImportError as error:
            return Verdict(False, f"Triton cannot be imported: {error}")
        if release is None:
            return Verdict(False, "Triton's interpreter runs the kernels")
        reason = self._precondition()
        if reason:
            return Verdict(False, reason)
        if release in self._known:
            reason = self._known[release]
            return (
                Verdict(False, f"Triton {_text(release)} cannot: {reason}")
                if reason
                else Verdict(True, f"tested with Triton {_text(release)}")
            )
        if release < min(self._known):
            return Verdict(False, f"Triton {_text(release)} is older than {_text(min(self._known))}")
        return Verdict(None, f"Triton {_text(release)} is not known yet: a self-check at first use decides")

    def _checked(self, device: torch.device) -> Verdict:
        release = self._release()
        assert release is not None  # it would not have to be checked
        self._is_checking = True
        try:
            problem = self.check(device)
        except Exception as error:  # a release to come may raise anything
            lines = str(error).strip().splitlines()
            problem = f"{type(error).__name__}: {lines[0] if lines else ''}"
        finally:
            self._is_checking = False
        unknown = f"Triton {_text(release)} is not known yet"
        return (
            Verdict(False, f"{unknown}, and the self-check failed: {problem}")
            if problem
            else Verdict(True, f"{unknown}; the self-check passed")
        )


@cache
def running_release() -> Release | None:
    """Major and minor number of the Triton that runs; None where it interprets kernels."""
    import triton

    return None if triton.knobs.runtime.interpret else parse_release(triton.__version__)


def may_limit_registers() -> bool:
    """Whether kernels whose warps have roles may be compiled for fewer registers than a multiprocessor has for them. Where a release hands
    them out by other rules, such a kernel waits for more without end, so that no check at first use could find out."""
    release = running_release()
    return release is None or release in KNOWN


def parse_release(version: str) -> Release:
    """The first two numbers, of ``3.8.0+git1f`` or ``3.10.0rc1``, too; (0, 0) where there are none."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _text(release: Release) -> str:
    return ".".join(map(str, release))


HOPPER_KERNEL = Gate({release: known.hopper_kernel for release, known in KNOWN.items()})
DIRECT_LAUNCH = Gate({release: known.direct_launch for release, known in KNOWN.items()}, precondition=why_missing)


def describe(has_hopper_kernel: bool) -> str:
    """Which kernel and which launch are used, and why one of them is not the fast one.

    Args:
        has_hopper_kernel: whether the kernel for Hopper could serve.
    """
    launch = DIRECT_LAUNCH.verdict()
    parts = [_choice("launched by the CUDA driver", "launched by Triton", launch)]
    if has_hopper_kernel:
        parts.insert(0, _choice("the kernel for Hopper", "the plain kernel", HOPPER_KERNEL.verdict()))
    return ", ".join(parts)


def _choice(fast: str, slow: str, verdict: Verdict) -> str:
    if verdict.used:
        return fast
    return f"{slow} ({verdict.why})" if verdict.used is False else f"{fast} or not ({verdict.why})"


_warned = threading.Event()


def warn_if_slow(has_hopper_kernel: bool) -> None:
    """Warns once a process where one of the fast ways is off that this GPU could take.

    Args:
        has_hopper_kernel: whether the kernel for Hopper could serve what is launched.
    """
    if _warned.is_set():
        return
    slow = []
    kernel, launch = HOPPER_KERNEL.verdict(), DIRECT_LAUNCH.verdict()
    if has_hopper_kernel and kernel.used is False:
        slow.append(f"the plain kernel runs instead of the one for Hopper, at about four fifths of its speed, since {kernel.why}")
    if launch.used is False:
        slow.append(f"launches go through Triton, which takes two to three times as long on the host, since {launch.why}")
    if slow:
        _warned.set()
        good = [release for release, known in KNOWN.items() if known == Known()]
        warnings.warn(
            f"backend triton is slower here than it could be: {'; '.join(slow)}. Known to be fast are Triton {_text(min(good))} to "
            f"{_text(max(good))}, with a CUDA driver of 12.4 or newer; `cpattn env` says what there is.",
            SlowKernelWarning,
            stacklevel=2,
        )
