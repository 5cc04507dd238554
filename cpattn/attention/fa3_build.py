"""What a build of FlashAttention-3 can do. Builds differ, so each is asked: by its configuration, else by a try."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cpattn.attention.fa3_functions import OperatorArguments, call_functions
from cpattn.current import is_capturing
from cpattn.installed import is_installed
from cpattn.problem import Problem

FIX = "pip install 'cpattn[fa3]' beside a torch for CUDA 13, or build the hopper folder of the flash-attention repository"


class Names(NamedTuple):
    """The modules that a build comes as, and the namespace of its operators."""

    interface: str
    config: str
    operators: str


# What the repository's hopper folder makes, tokenspeed-fa3 too; and fa3-fwd, which renames all of it.
NAMES = (Names("flash_attn_interface", "flash_attn_config", "flash_attn_3"), Names("fa3_fwd_interface", "fa3_fwd_config", "fa3_fwd"))

# The arguments that the operator is called with; one that lacks any is left to the package's own functions.
_NEEDED = frozenset(OperatorArguments._fields)
# What is said of a call that needs what a build was made without, by the name that its configuration has for it.
_LACKING = {"VARLEN": "no ragged batches", "FP16": "no fp16", "LOCAL": "no sliding window", "SOFTCAP": "no softcap", "FP8": "no fp8"}
_HEAD_DIMS = (64, 96, 128, 192, 256)
_TRIED_KEYS = 4


@dataclass(frozen=True, eq=False)
class Build:
    """A build that has been imported.

    Attributes:
        module: that it is used through.
        forward: takes what the operator ``fwd`` takes, by name, and returns out ``[T, Hq, Dv]`` and the LSE ``[Hq, T]``.
        is_operator: whether that is the operator itself. The package's own functions do the same, but cost the host more.
        left_out: what it was made without, by the names of its configuration (``FP16``, ``HDIM96``); None if it has none.
        takes_out: whether ``forward`` also takes memory for the output, ``out``.
    """

    module: str
    forward: Callable[..., tuple[Tensor, Tensor]]
    is_operator: bool
    left_out: frozenset[str] | None
    takes_out: bool = False

    def has(self, feature: str) -> bool:
        """Whether it was made with a feature, by the name of its configuration; where there is none, it is believed to be."""
        return self.left_out is None or feature not in self.left_out

    def refuses(self, problem: Problem) -> str | None:
        """What the call needs and the build lacks, in words; None if it can serve it."""
        who = f"this build of FlashAttention-3 ({self.module}) has"
        needed = {
            "VARLEN": True,
            "FP16": problem.dtype == torch.float16,
            "LOCAL": problem.window is not None,
            "SOFTCAP": problem.softcap is not None,
            "FP8": problem.q_dtype is not None,
        }
        for feature, needs in needed.items():
            if needs and not self.has(feature):
                return f"{who} {_LACKING[feature]}"
        head_dim, v_head_dim = problem.head_dim, problem.v_head_dim
        most = max((size for size in _HEAD_DIMS if self.has(f"HDIM{size}")), default=0)
        if head_dim > most:
            return f"{who} head dims up to {most}, not {head_dim}"
        if head_dim != v_head_dim and not self.has("HDIMDIFF64" if head_dim <= 64 else "HDIMDIFF192"):
            return f"{who} one head_dim for q, k and v ({v_head_dim} is not {head_dim})"
        failure = None if self.left_out is not None else _failure(self, _Trial.of(problem, paged=False), problem.device)
        return f"{who} no configuration, and a try failed: {failure}" if failure else None

    def reads_pages(self, problem: Problem) -> bool:
        """Whether it can attend to pages."""
        if self.left_out is not None:
            return self.has("PAGEDKV")
        return _failure(self, _Trial.of(problem, paged=True), problem.device) is None

    def __str__(self) -> str:
        """The module, how it is called, and what it was made without: a line for ``cpattn env``."""
        how = "by its operator" if self.is_operator else "by its Python functions, as its operator is not one that cpattn knows"
        if self.left_out is None:
            return f"{self.module}, called {how}; it has no configuration, so features are tried"
        return f"{self.module}, called {how}; made without {', '.join(sorted(self.left_out)) or 'nothing left out'}"


class _Trial(NamedTuple):
    """The features of a launch that is tried."""

    dtype: torch.dtype
    head_dim: int
    v_head_dim: int
    window: bool
    softcap: bool
    paged: bool

    @classmethod
    def of(cls, problem: Problem, paged: bool) -> _Trial:
        return cls(
            problem.q_dtype or problem.dtype,
            problem.head_dim,
            problem.v_head_dim,
            problem.window is not None,
            problem.softcap is not None,
            paged,
        )


def why_no_build() -> str | None:
    """Why there is none, without importing anything; None if there is one."""
    return None if _names() else f"{NAMES[0].interface} is not installed; {FIX}"


def find_build() -> Build:
    """The build that is installed, imported at the first call. Raises ImportError, in words, where it cannot be."""
    found = _find_build()
    if isinstance(found, str):
        raise ImportError(found)
    return found


def _names() -> Names | None:
    return _installed(NAMES)


@cache
def _installed(all_names: tuple[Names, ...]) -> Names | None:
    """To look through the folders of all packages takes longer than all else that the choice of a backend does."""
    return next((names for names in all_names if is_installed(names.interface)), None)


@cache
def _find_build() -> Build | str:
    """The build, or why there is none; a failed import is not tried again."""
    found = _names()
    if found is None:
        return why_no_build() or ""
    try:
        interface = import_module(found.interface)
    except Exception as failure:  # a library for another CUDA or torch may raise anything
        return f"{found.interface} cannot be imported ({type(failure).__name__}: {failure}); {FIX}"
    # A module of that name may only pass on what another one has.
    home = sys.modules.get(interface.flash_attn_varlen_func.__module__, interface)
    names = next((names for names in NAMES if names.interface == home.__name__), found)
    operator = _operator(names.operators)
    forward = partial(_call_operator, operator) if operator is not None else partial(call_functions, interface)
    takes_out = operator is not None and "out" in _arguments(operator)
    return Build(found.interface, forward, operator is not None, _left_out(names.config), takes_out)


def _operator(namespace: str) -> Any | None:
    """The operator ``fwd``, if it takes all that it is to be called with."""
    try:
        operator = getattr(torch.ops, namespace).fwd.default
    except AttributeError:
        return None
    return operator if _arguments(operator) >= _NEEDED else None


def _arguments(operator: Any) -> set[str]:
    return {argument.name for argument in operator._schema.arguments}


def _call_operator(operator: Any, **arguments: Any) -> tuple[Tensor, Tensor]:
    out, lse_HT, *_ = operator(**arguments)
    return out, lse_HT


def _left_out(config: str) -> frozenset[str] | None:
    """What the configuration says that the build was made without; None if there is no configuration."""
    try:
        flags: dict[str, bool] = import_module(config).CONFIG["build_flags"]
        # FLASHATTENTION_DISABLE_FP16, but FLASH_ATTENTION_DISABLE_HDIMDIFF64.
        return frozenset(name.split("_DISABLE_")[1] for name, is_set in flags.items() if "_DISABLE_" in name and is_set)
    except (ImportError, AttributeError, KeyError, TypeError):
        return None


def _failure(build: Build, trial: _Trial, device: torch.device) -> str | None:
    """Why a launch with these features fails; None if it does not. It waits for the device, once for each kind of launch."""
    if is_capturing(device):
        return "a launch cannot be tried while a CUDA graph captures; make the call once before"
    return _tried(build, trial, device)


@cache
def _tried(build: Build, trial: _Trial, device: torch.device) -> str | None:
    """One query over four keys that are alike, of which a window lets it see the last; by its result and its LSE."""

    def tensor(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    keys = (1, _TRIED_KEYS) if trial.paged else (_TRIED_KEYS,)
    q, k = (torch.ones(*shape, 1, trial.head_dim, dtype=trial.dtype, device=device) for shape in ((1,), keys))
    v = torch.full((*keys, 1, trial.v_head_dim), 0.5, dtype=trial.dtype, device=device)
    want = (math.tanh(1.0) if trial.softcap else 1.0) + (0.0 if trial.window else math.log(_TRIED_KEYS))
    try:
        out, lse_HT = build.forward(
            q=q,
            k=k,
            v=v,
            cu_seqlens_q=tensor(0, 1),
            cu_seqlens_k=None if trial.paged else tensor(0, _TRIED_KEYS),
            seqused_k=tensor(_TRIED_KEYS),
            max_seqlen_q=1,
            max_seqlen_k=_TRIED_KEYS,
            page_table=tensor(0)[None] if trial.paged else None,
            kv_batch_idx=tensor(0) if trial.paged else None,
            leftpad_k=tensor(0) if trial.paged else None,
            k_descale=None,
            v_descale=None,
            softmax_scale=1.0 / trial.head_dim,
            is_causal=True,
            window_size_left=0 if trial.window else -1,
            window_size_right=0 if trial.window else -1,
            softcap=1.0 if trial.softcap else 0.0,
            num_splits=1,
            pack_gqa=None,
        )
        right = bool((out.float() - 0.5).abs().max() < 1e-2 and (lse_HT - want).abs().max() < 1e-2)
    except Exception as failure:
        lines = str(failure).strip().splitlines()
        return lines[0] if lines else type(failure).__name__
    return None if right else "its result is wrong"
