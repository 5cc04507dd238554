"""What each backend can do on this machine: each is asked about one call a feature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from cpattn.attention.backend import Backend
from cpattn.attention.registry import BACKENDS
from cpattn.problem import Problem
from cpattn.spans import Alignment

_PAGE_SIZE = 16
# What a call may ask for: what of it differs from a plain one, and the alignments of its spans.
_PLAIN: frozenset[Alignment] = frozenset({"bottom_right"})
_FEATURES: dict[str, tuple[dict[str, Any], frozenset[Alignment]]] = {
    "window": ({"window": 16}, _PLAIN),
    "softcap": ({"softcap": 30.0}, _PLAIN),
    "sinks": ({"sinks": True}, _PLAIN),
    "buckets": ({"fixed": True}, _PLAIN),
    "fp32": ({"dtype": torch.float32}, _PLAIN),
    "Dv!=D": ({"v_head_dim": 64}, _PLAIN),
    "ring": ({}, frozenset({"bottom_right", "full"})),
    "ring+window": ({"window": 16}, frozenset({"any"})),
}


def backend_features(guarded: Callable[[Callable[[], Any], Callable[[str], Any]], Any]) -> dict[str, Any]:
    """For each backend on the device that it is for, or the machine's best: ``device``, ``usable``, ``why_not``, for each
    feature None or why not, and ``build``: what the installed package says of itself, if anything.

    Args:
        guarded: calls its first argument, or the second with what that raised; a broken package must not spoil the rest.
    """
    has_gpu = guarded(torch.cuda.is_available, lambda failure: False)
    found = {name: guarded(partial(_features, backend, has_gpu), _broken) for name, backend in BACKENDS.items()}
    return {name: entry | {"build": guarded(BACKENDS[name].describe, lambda failure: failure)} for name, entry in found.items()}


def _features(backend: Backend, has_gpu: bool) -> dict[str, Any]:
    on_gpu = has_gpu if backend.device_types is None else "cuda" in backend.device_types
    device = "cuda" if on_gpu else "cpu"
    plain = Problem(torch.device(device), torch.bfloat16, rows=1, q_heads=8, kv_heads=8, head_dim=128, v_head_dim=128)
    why_not = backend.why_not(plain, _PLAIN)
    if why_not is None and on_gpu and not has_gpu:
        why_not = "there is no CUDA device"
    features: dict[str, str | None] = {}
    if not why_not:
        features = {name: backend.why_not(replace(plain, **asked), alignments) for name, (asked, alignments) in _FEATURES.items()}
        reads = backend.reads_pages(replace(plain, cache="paged", page_size=_PAGE_SIZE))
        features["pages"] = None if reads else f"it does not read pages of {_PAGE_SIZE} tokens as they are; it is given a packed copy"
    return {"device": device, "usable": why_not is None, "why_not": why_not, "features": features}


def _broken(failure: str) -> dict[str, Any]:
    return {"device": None, "usable": False, "why_not": failure, "features": {}}
