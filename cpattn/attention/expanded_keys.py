"""A backend over rows of a latent: they are expanded to keys and values of each head, and these are attended to, by groups of heads.

So whatever strategy brings latents together, they travel as they are, those that a launch's queries see are expanded and no others, and
no more of what they are expanded to is held than two groups.
On a GPU a group is expanded on a stream of its own, beside the attention to the group before it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cpattn.attention.backend import AttentionOptions, Backend
from cpattn.attention.seen_rows import SeenRows
from cpattn.errors import TensorMismatchError
from cpattn.expansion import ExpandFunction, head_groups
from cpattn.keys import Keys
from cpattn.moves.wide_copy import copy_wide_
from cpattn.problem import Problem
from cpattn.spans import Spans

# An attention fills the multiprocessors until its last tiles, beside which the next group can begin. benchmarks/bench_mla.py compares.
EXPANDS_BESIDE = True

Launch = Callable[[slice, Keys], None]
_streams = threading.local()


def over_latents(backend: Backend, expand: ExpandFunction, problem: Problem) -> Backend:
    """The backend for keys that are rows of a latent, ``[S, 1, L]``.

    >>> import cpattn
    >>> problem = Problem(torch.device("cpu"), torch.float32, 3, 2, 2, head_dim=8, v_head_dim=4, latent_dim=6)
    >>> weight = torch.randn(2, 6, 12)  # of each head
    >>> def expand(latent, heads):
    ...     k_and_v = torch.einsum("nr,hrd->nhd", latent[:, 0], weight[heads])
    ...     return k_and_v[..., :8], k_and_v[..., 8:]
    >>> q, latent = torch.randn(3, 2, 8), torch.randn(3, 1, 6)
    >>> spans, options = Spans.build([3], [0], [3], [1]), AttentionOptions(1.0)
    >>> out, _ = over_latents(cpattn.BACKENDS["cpu"], expand, problem).attend(q, Keys(latent, latent), spans, options, q.dtype)
    >>> expanded = Keys(*expand(latent, slice(0, 2)))
    >>> torch.equal(out, cpattn.BACKENDS["cpu"].attend(q, expanded, spans, options, q.dtype)[0])
    True
    """
    accumulate = backend.accumulate

    def attend(q: Tensor, keys: Keys, spans: Spans, options: AttentionOptions, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        latent, spans = seen(keys.k, spans, options)
        groups = head_groups(problem, len(latent))
        if len(groups) == 1 and len(latent):
            return backend.attend(q, expanded(groups[0], latent), spans, options, out_dtype)
        out = q.new_empty(*q.shape[:2], problem.v_head_dim, dtype=out_dtype)
        lse = q.new_empty(q.shape[:2], dtype=problem.merge_dtype)
        if not len(latent):
            return out.zero_(), lse.fill_(-torch.inf)

        def launch(heads: slice, keys: Keys) -> None:
            of_heads = q[:, heads], keys, spans, options_of(options, heads)
            if backend.attend_into is None:
                part, lse[:, heads] = backend.attend(*of_heads, out_dtype)
                copy_wide_(out[:, heads], part)
            else:
                backend.attend_into(*of_heads, out[:, heads], lse[:, heads])

        in_groups(latent, groups, launch)
        return out, lse

    def accumulate_expanded(q: Tensor, keys: Keys, spans: Spans, options: AttentionOptions, acc: Tensor, lse: Tensor) -> None:
        def launch(heads: slice, keys: Keys) -> None:
            assert accumulate is not None  # or this is not called
            accumulate(q[:, heads], keys, spans, options_of(options, heads), acc[:, heads], lse[:, heads])

        latent, spans = seen(keys.k, spans, options)
        if len(latent):
            in_groups(latent, head_groups(problem, len(latent)), launch)

    def seen(latent: Tensor, spans: Spans, options: AttentionOptions) -> tuple[Tensor, Spans]:
        rows = SeenRows.of(spans, options.window, len(latent))
        return rows.take(latent), rows.spans

    def expanded(heads: slice, latent: Tensor) -> Keys:
        # No backend has a backward pass, and the weights of a model may ask for one.
        with torch.no_grad():
            return Keys(*_checked(expand(latent, heads), latent, heads, problem))

    def in_groups(latent: Tensor, groups: list[slice], launch: Launch) -> None:
        run = _beside if latent.is_cuda and EXPANDS_BESIDE and len(groups) > 1 else _in_turn
        run(groups, lambda heads: expanded(heads, latent), launch)

    into = None if accumulate is None else accumulate_expanded
    return replace(backend, attend=attend, attend_into=None, accumulate=into)


def options_of(options: AttentionOptions, heads: slice) -> AttentionOptions:
    """Those of some query heads."""
    return options if options.sinks is None else replace(options, sinks=options.sinks[heads])


def _in_turn(groups: list[slice], expanded: Callable[[slice], Keys], launch: Launch) -> None:
    for heads in groups:
        launch(heads, expanded(heads))


def _beside(groups: list[slice], expanded: Callable[[slice], Keys], launch: Launch) -> None:
    """Each group while the one before it is attended to. CUDA graphs capture both streams."""
    here = torch.cuda.current_stream()
    beside = _stream_beside(here)

    def expanded_beside(heads: slice) -> tuple[Keys, torch.cuda.Event]:
        with torch.cuda.stream(beside):
            return expanded(heads), beside.record_event()

    beside.wait_stream(here)
    try:
        keys, ready = expanded_beside(groups[0])
        for heads, following in zip(groups, [*groups[1:], None], strict=True):
            here.wait_event(ready)
            launch(heads, keys)
            attended = here.record_event()
            after = None if following is None else expanded_beside(following)
            # The keys are memory of that stream, which writes them anew once they are let go.
            beside.wait_event(attended)
            if after is not None:
                keys, ready = after
    finally:
        here.wait_stream(beside)


def _stream_beside(here: torch.cuda.Stream) -> torch.cuda.Stream:
    """Of this thread and device: a graph that one thread captures takes in what others put on the same stream."""
    found: dict[torch.device, torch.cuda.Stream] = _streams.__dict__.setdefault("of_devices", {})
    stream = found.get(here.device)
    if stream is None:
        stream = found[here.device] = torch.cuda.Stream(here.device)  # type: ignore[no-untyped-call]
    return stream


def _checked(returned: Any, latent: Tensor, heads: slice, problem: Problem) -> tuple[Tensor, Tensor]:
    """``(k, v)`` of what a caller's function returned; nothing waits for the device. Raises TensorMismatchError."""
    what = f"expand(latent {tuple(latent.shape)}, heads {heads.start}:{heads.stop})"
    if not isinstance(returned, (tuple, list)) or len(returned) != 2 or not all(isinstance(x, Tensor) for x in returned):
        kinds = ", ".join(type(x).__name__ for x in returned) if isinstance(returned, (tuple, list)) else type(returned).__name__
        raise TensorMismatchError(f"{what} returned {kinds or 'nothing'}; it must return two tensors, (k, v) of those heads")
    k, v = returned
    for name, x, dim in (("k", k, problem.head_dim), ("v", v, problem.v_head_dim)):
        shape = len(latent), heads.stop - heads.start, dim
        if x.shape != shape:
            of = "q's head_dim" if name == "k" else "v_dim"
            raise TensorMismatchError(
                f"{what} returned {name} of shape {tuple(x.shape)}, but it must be [rows, heads, {of}] = {shape}; return the {name} of "
                "each row of the latent for those heads alone"
            )
        if x.dtype != latent.dtype or x.device != latent.device:
            raise TensorMismatchError(
                f"{what} returned {name} in {x.dtype} on {x.device}, but the latent is {latent.dtype} on {latent.device}; return it in "
                "that dtype, on that device"
            )
    # Kernels take heads whose numbers follow each other.
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    return k, v
