"""Kernels of other packages as steps of a call that is noted: what they launch nobody sees, and so it is launched again as a whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from cpattn.attention.backend import AttendIntoFunction, AttentionFunction, AttentionOptions
from cpattn.keys import Keys
from cpattn.noted import launch
from cpattn.spans import Spans


def in_one_step(attend: AttentionFunction) -> AttentionFunction:
    """The same, as a step that makes its result."""

    def attend_in_one_step(q: Tensor, keys: Keys, spans: Spans, options: AttentionOptions, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        tensors, filled = _taken_apart(q, keys, options)

        def again(*others: Tensor) -> tuple[Tensor, Tensor]:
            q, keys, options = filled(others)
            return attend(q, keys, spans, options, out_dtype)

        return launch(again, *tensors)

    return attend_in_one_step


def into_in_one_step(attend_into: AttendIntoFunction) -> AttendIntoFunction:
    """The same, as a step."""

    def attend_into_in_one_step(q: Tensor, keys: Keys, spans: Spans, options: AttentionOptions, out: Tensor, lse: Tensor) -> None:
        tensors, filled = _taken_apart(q, keys, options)

        def again(out: Tensor, lse: Tensor, *others: Tensor) -> None:
            q, keys, options = filled(others)
            attend_into(q, keys, spans, options, out, lse)

        launch(again, out, lse, *tensors)

    return attend_into_in_one_step


def _taken_apart(
    q: Tensor, keys: Keys, options: AttentionOptions
) -> tuple[list[Tensor], Callable[[tuple[Tensor, ...]], tuple[Tensor, Keys, AttentionOptions]]]:
    """The tensors of these, and what puts others in their places; it keeps none of them alive."""
    if keys.arrivals is not None or keys.prefix is not None or keys.own is not None:
        raise AssertionError("kernels of other packages take keys that are there, all in one place")
    parts = q, keys.k, keys.v, keys.page_table, keys.k_scale, keys.v_scale, options.sinks
    is_there = [x is not None for x in parts]
    without_sinks = replace(options, sinks=None)

    def filled(others: tuple[Tensor, ...]) -> tuple[Tensor, Keys, AttentionOptions]:
        left = iter(others)
        q, *of_keys, sinks = [next(left) if there else None for there in is_there]
        return q, Keys(*of_keys), without_sinks if sinks is None else replace(without_sinks, sinks=sinks)  # type: ignore[return-value, arg-type]

    return [x for x in parts if x is not None], filled
