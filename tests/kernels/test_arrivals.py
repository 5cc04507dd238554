"""Attention that runs while its keys come: it waits for each piece, and for no other."""

# mypy: allow-untyped-calls

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from cpattn.kernels.arrival_layout import FIRST_FLAG, PIECE_ROWS, flag_words
from cpattn.kernels.ragged_attention import ragged_attention, specialized_kernel
from cpattn.keys import Arrivals, Keys
from cpattn.options import AttentionOptions
from cpattn.spans import Spans

needs_waiting = pytest.mark.skipif(
    not torch.cuda.is_available() or specialized_kernel(torch.device("cuda")) is None,
    reason="needs a Hopper GPU, and a Triton that has what its kernel needs",
)
NUM_KEYS, TURN = 3001, 7
OPTIONS = AttentionOptions(scale=0.1)


def causal(tokens: int) -> Spans:
    return Spans.build(np.array([tokens]), np.array([0]), np.array([tokens]), np.array([1]), "cuda")


@needs_waiting
@pytest.mark.parametrize("side_by_side", [False, True], ids=["alone", "with room"])
@pytest.mark.parametrize("window", [None, 700])
def test_it_waits_for_each_piece_until_it_is_there(window: int | None, side_by_side: bool) -> None:
    """Copies bring the pieces after the launch, in any order, each with its flag after it."""
    torch.manual_seed(0)
    options = AttentionOptions(scale=0.1, window=window)
    q, spans = torch.randn(NUM_KEYS, 16, 128, device="cuda", dtype=torch.bfloat16), causal(NUM_KEYS)
    whole = torch.randn(2, NUM_KEYS, 4, 128, device="cuda", dtype=torch.bfloat16)
    expected = ragged_attention(q, Keys(whole[0], whole[1]), spans, options)
    come = torch.full_like(whole, torch.nan)
    pieces = -(-NUM_KEYS // PIECE_ROWS)
    late = (torch.arange(pieces, device="cuda") % 3 > 0).int()
    for piece in range(0, pieces, 3):
        rows = slice(piece * PIECE_ROWS, (piece + 1) * PIECE_ROWS)
        come[:, rows] = whole[:, rows]
    flags = torch.full((flag_words(pieces),), TURN - 1, device="cuda", dtype=torch.int32)
    flags[:1] = TURN
    keys = Keys(come[0], come[1], arrivals=Arrivals(flags, late, side_by_side))
    # Compiled before anything waits.
    flags[1] = TURN
    ragged_attention(q, keys, spans, options)
    flags[1] = TURN - 1
    beside = torch.cuda.Stream()
    # From the host: copy engines bring them, where no multiprocessor is free.
    source, turn = whole.cpu().pin_memory(), torch.tensor([TURN], dtype=torch.int32).pin_memory()
    torch.cuda.synchronize()
    out, lse = ragged_attention(q, keys, spans, options)
    ended = torch.cuda.Event()
    ended.record()
    with torch.cuda.stream(beside):
        for piece in torch.randperm(pieces).tolist():
            if piece % 3:
                rows = slice(piece * PIECE_ROWS, (piece + 1) * PIECE_ROWS)
                assert not ended.query()
                for to, one in zip(come, source, strict=True):
                    to[rows].copy_(one[rows], non_blocking=True)
                flags[FIRST_FLAG + piece : FIRST_FLAG + piece + 1].copy_(turn, non_blocking=True)
    torch.cuda.synchronize()
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])


@needs_waiting
def test_it_waits_for_nothing_once_all_is_there() -> None:
    q, spans = torch.randn(300, 16, 128, device="cuda", dtype=torch.bfloat16), causal(300)
    k, v = torch.randn(2, 300, 4, 128, device="cuda", dtype=torch.bfloat16)
    pieces = -(-300 // PIECE_ROWS)
    flags = torch.zeros(flag_words(pieces), device="cuda", dtype=torch.int32)
    late = torch.ones(pieces, device="cuda", dtype=torch.int32)
    flags[:FIRST_FLAG] = TURN
    out, lse = ragged_attention(q, Keys(k, v, arrivals=Arrivals(flags, late)), spans, OPTIONS)
    expected = ragged_attention(q, Keys(k, v), spans, OPTIONS)
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])
