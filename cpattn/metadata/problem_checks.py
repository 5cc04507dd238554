"""What a caller's Problem must be before anything is worked out from it."""

from __future__ import annotations

from typing import Any

from cpattn.errors import HeadCountError, OptionError, shown
from cpattn.metadata.batch import is_integer
from cpattn.problem import Problem
from cpattn.stored import FP8, HALF, is_fp8


def check_is_problem(problem: Any) -> None:
    """Raises OptionError for anything else."""
    if not isinstance(problem, Problem):
        raise OptionError(f"problem is a {type(problem).__name__}; pass a cpattn.Problem(device, dtype, plan.rows, ...)")


def check_problem(problem: Problem) -> None:
    """Raises OptionError or HeadCountError for heads, head dims, a window or pages that no call could have."""
    for name in ("q_heads", "kv_heads", "head_dim", "v_head_dim"):
        value = getattr(problem, name)
        if not is_integer(value) or value < 1:
            raise OptionError(f"problem.{name}={shown(value)}; it must be an integer of at least 1")
    if problem.window is not None and (not is_integer(problem.window) or problem.window < 1):
        raise OptionError(
            f"problem.window={shown(problem.window)}; pass the number of keys that a query sees, its own included: an integer of at least "
            "1, or None"
        )
    if problem.q_heads % problem.kv_heads:
        raise HeadCountError(
            f"problem.q_heads={shown(problem.q_heads)} is no multiple of kv_heads={shown(problem.kv_heads)}; it must be one"
        )
    _check_latent(problem)
    _check_stored(problem)


def _check_latent(problem: Problem) -> None:
    latent_dim: Any = problem.latent_dim
    if latent_dim is None:
        return
    if not is_integer(latent_dim) or latent_dim < 1:
        raise OptionError(f"problem.latent_dim={shown(latent_dim)}; pass the width of the latent, an integer of at least 1, or None")
    if problem.q_heads != problem.kv_heads or problem.v_in_k:
        raise OptionError(
            f"problem.latent_dim={latent_dim} with kv_heads={problem.kv_heads} and v_in_k={problem.v_in_k}; a latent is expanded to keys "
            f"and values of each query head: pass kv_heads={problem.q_heads}, and no v_in_k"
        )


def _check_stored(problem: Problem) -> None:
    kv_dtype, scales = problem.kv_dtype, problem.scales
    if kv_dtype is not None and (kv_dtype not in (problem.dtype, *HALF, *FP8) or problem.cache != "paged"):
        known = ", ".join(map(str, (*HALF, *FP8)))
        raise OptionError(
            f"problem.kv_dtype={shown(kv_dtype)} with cache={shown(problem.cache)}; it is for pages (cache='paged') in another dtype than "
            f"q's: {known}"
        )
    kinds: tuple[str | None, ...] = ("head", "token") if is_fp8(problem.stored_dtype) else (None,)
    if scales not in kinds:
        raise OptionError(
            f"problem.scales={shown(scales)} for keys in {problem.stored_dtype}; it must be {' or '.join(map(repr, kinds))}, as fp8 alone "
            "has scales"
        )
