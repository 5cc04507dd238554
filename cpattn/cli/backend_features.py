"""What each backend can do on this machine: each is asked about one call a feature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, fields, replace
from functools import partial
from typing import Any

import torch

from cpattn.attention.backend import Backend, Call
from cpattn.attention.registry import BACKENDS

_PAGE_SIZE = 16
# What a flag of a call is known as, if not by its own name.
_NAMES = {"fixed": "buckets"}
# What else a call may ask for, beside the flags that Call has.
_OTHER_FEATURES: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": torch.float32},
    "Dv!=D": {"v_head_dim": 64},
    "ring": {"alignments": frozenset({"bottom_right", "full"}), "merges": True},
    "ring+window": {"alignments": frozenset({"any"}), "merges": True, "window": True},
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
    call = _plain_call(torch.device(device))
    why_not = backend.why_not(call)
    if why_not is None and on_gpu and not has_gpu:
        why_not = "there is no CUDA device"
    features = {} if why_not else {name: backend.why_not(replace(call, **asked)) for name, asked in _asked().items()}
    # Not every version of cpattn has pages.
    reads_pages = getattr(backend, "reads_pages", None)
    if features and reads_pages is not None:
        paged: dict[str, Any] = {"page_size": _PAGE_SIZE}
        reads = reads_pages(replace(call, **paged))
        features["pages"] = None if reads else f"it does not read pages of {_PAGE_SIZE} tokens as they are; it is given a packed copy"
    return {"device": device, "usable": why_not is None, "why_not": why_not, "features": features}


def _broken(failure: str) -> dict[str, Any]:
    return {"device": None, "usable": False, "why_not": failure, "features": {}}


def _plain_call(device: torch.device) -> Call:
    """bf16 heads of 128, one step, and nothing else asked for; flags that are new here are off."""
    plain: dict[str, Any] = {
        "device": device,
        "dtype": torch.bfloat16,
        "head_dim": 128,
        "v_head_dim": 128,
        "alignments": frozenset({"bottom_right"}),
    }
    plain |= {field.name: False for field in fields(Call) if field.name not in plain and field.default is MISSING}
    return Call(**plain)


def _asked() -> dict[str, dict[str, Any]]:
    """The fields of a call that differ from the plain one, by feature."""
    flags: dict[str, dict[str, Any]] = {
        _NAMES.get(field.name, field.name): {field.name: True}
        for field in fields(Call)
        if field.type in ("bool", bool) and field.name != "merges"
    }
    return flags | _OTHER_FEATURES
