"""A row's bits depend on its own keys alone: not on the strategy that brings them into one launch, nor on who has which heads."""

from __future__ import annotations

from dataclasses import replace
from threading import Lock
from typing import Any

import pytest
import torch
from inputs.cases import AttentionCase
from torch import Tensor

pytest.importorskip("triton")

import cpattn
from cpattn.attention.triton import triton_attend_into, triton_attention
from cpattn.testing import run_loopback

# The interpreter works for one thread at a time.
ONE = Lock()


def attend(
    q: Tensor, keys: cpattn.Keys, spans: cpattn.Spans, options: cpattn.AttentionOptions, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    with ONE:
        return triton_attention(q, keys, spans, options, out_dtype)


def attend_into(q: Tensor, keys: cpattn.Keys, spans: cpattn.Spans, options: cpattn.AttentionOptions, out: Tensor, lse: Tensor) -> None:
    with ONE:
        triton_attend_into(q, keys, spans, options, out, lse)


ANYWHERE = replace(
    cpattn.BACKENDS["triton"],
    name="triton anywhere",
    attend=attend,
    attend_into=attend_into,
    device_types=None,
    unavailable=lambda: None,
    refuses=lambda problem: None,
    waits_for_keys=lambda problem: False,
    reads_in_place=lambda problem: False,
)


def case_on(device: str) -> AttentionCase:
    batch = [(70, 90), (0, 33), (5, 1)]
    return AttentionCase(batch, heads=8, kv_heads=2, dtype=torch.bfloat16, sinks=True, window=50, device=device)


def results(case: AttentionCase, size: int, strategy: str, backend: Any) -> list[tuple[Tensor, Tensor]]:
    plan = case.plan(size, pad_to=8)
    return run_loopback(lambda group: case.on_rank(plan, group.rank, group, strategy, backend), size)


def test_heads_that_are_divided_have_the_bits_of_an_all_gather(device: str) -> None:
    """The library's own kernel, and all that is moved around it."""
    case = case_on(device)
    for expected, got in zip(results(case, 4, "all_gather", ANYWHERE), results(case, 4, "ulysses", ANYWHERE), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(expected, got, strict=True))


def test_groups_of_heads_have_the_bits_of_all(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel writes each to its place in the result, and where it cannot it is copied there."""

    def nothing(q: Tensor, keys: Any, spans: Any, options: Any, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        raise AssertionError("a result was made that has to be copied")

    case = case_on(device)
    whole = results(case, 2, "all_gather", ANYWHERE)
    for backend in (replace(ANYWHERE, attend=nothing), replace(ANYWHERE, attend_into=None)):
        # As one of the library's, whose results are not looked at.
        monkeypatch.setitem(cpattn.BACKENDS, "triton anywhere", backend)
        for expected, got in zip(whole, results(replace(case, overlap=2), 2, "all_gather", "triton anywhere"), strict=True):
            assert all(torch.equal(x, y) for x, y in zip(expected, got, strict=True))
