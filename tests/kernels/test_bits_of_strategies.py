"""A row's bits depend on its own keys alone: not on the strategy that brings them into one launch, nor on who has which heads."""

from __future__ import annotations

from dataclasses import replace
from threading import Lock

import pytest
import torch
from inputs.cases import AttentionCase
from torch import Tensor

pytest.importorskip("triton")

import cpattn
from cpattn.attention.triton import triton_attention
from cpattn.testing import run_loopback

# The interpreter works for one thread at a time.
ONE = Lock()


def attend(
    q: Tensor, keys: cpattn.Keys, spans: cpattn.Spans, options: cpattn.AttentionOptions, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    with ONE:
        return triton_attention(q, keys, spans, options, out_dtype)


def test_heads_that_are_divided_have_the_bits_of_an_all_gather(device: str) -> None:
    """The library's own kernel, and all that is moved around it."""
    batch = [(70, 90), (0, 33), (5, 1)]
    case = AttentionCase(batch, heads=8, kv_heads=2, dtype=torch.bfloat16, sinks=True, window=50, device=device)
    anywhere = replace(
        cpattn.BACKENDS["triton"],
        name="triton anywhere",
        attend=attend,
        device_types=None,
        unavailable=lambda: None,
        refuses=lambda problem: None,
        waits_for_keys=lambda problem: False,
        reads_in_place=lambda problem: False,
    )
    plan = case.plan(4, pad_to=8)

    def results(strategy: str) -> list[tuple[Tensor, Tensor]]:
        return run_loopback(lambda group: case.on_rank(plan, group.rank, group, strategy, anywhere), 4)

    for expected, got in zip(results("all_gather"), results("ulysses"), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(expected, got, strict=True))
