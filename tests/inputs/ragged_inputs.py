"""Inputs for tests of kernels that take ragged rows, and the check of what they return."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cpattn.attention.backend import AttentionOptions
from cpattn.attention.ragged_rows import RaggedRows
from cpattn.attention.reference import reference_attention
from cpattn.keys import Keys

# For more of a kind of which the interpreter, which is slow, runs some.
compiled_only = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter runs others of this kind")


def make_rows(q_len: list[int], k_start: list[int], k_len: list[int], diagonal: list[int], device: str) -> RaggedRows:
    return RaggedRows.build(np.array(q_len), np.array(k_start), np.array(k_len), np.array(diagonal), device)


def random_rows(rng: np.random.Generator, num_keys: int, device: str) -> RaggedRows:
    """Rows of every kind: empty ones, single queries, ranges that overlap, diagonals before, in and behind the range."""
    n = int(rng.integers(1, 6))
    q_len = rng.choice([0, 1, 2, 15, 16, 17, 40, 70], n)
    k_len = np.where(rng.random(n) < 0.15, 0, rng.integers(1, num_keys + 1, n))
    k_start = rng.integers(0, num_keys - k_len + 1)
    diagonal = np.choose(
        rng.integers(0, 5, n),
        [k_len - q_len + 1, np.full(n, 1), k_len + rng.integers(0, 30, n), -rng.integers(0, 50, n), rng.integers(-20, num_keys, n)],
    )
    return RaggedRows.build(q_len, k_start, k_len, diagonal, device)


def make_qkv(
    rows: RaggedRows,
    num_keys: int,
    heads: tuple[int, int],
    dims: tuple[int, int],
    dtype: torch.dtype,
    device: str,
    seed: int,
    padding: int = 3,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, and k and v as views of one message. Padding of q and keys outside of every range are poisoned."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(rows.num_queries + padding, heads[0], dims[0], generator=generator).to(dtype)
    kv = torch.randn(num_keys, heads[1], sum(dims), generator=generator).to(dtype)
    covered = np.zeros(num_keys, dtype=bool)
    for start, length in zip(rows.host.k_start, rows.host.k_len, strict=True):
        covered[start : start + length] = True
    kv[torch.from_numpy(~covered)] = torch.nan
    q[rows.num_queries :] = torch.nan
    q, kv = q.to(device), kv.to(device)
    return q, kv[..., : dims[0]], kv[..., dims[0] :]


def _unit_roundoff(dtype: torch.dtype, device: torch.device) -> float:
    """Half a unit in the last place; a whole one for bf16 in the interpreter, which truncates where a GPU rounds."""
    truncates = dtype == torch.bfloat16 and device.type == "cpu"
    return torch.finfo(dtype).eps / (1 if truncates else 2)


def launch_attention(
    q: Tensor, k: Tensor, v: Tensor, rows: RaggedRows, *, scale: float, window: int | None = None, softcap: float | None = None,
    sinks: Tensor | None = None, **how: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The Triton kernel, with what else its wrapper takes by name."""
    from cpattn.kernels.ragged_attention import ragged_attention

    return ragged_attention(q, Keys(k, v, rows.page_table), rows, AttentionOptions(scale, window, softcap, sinks), **how)


def check(
    q: Tensor, k: Tensor, v: Tensor, rows: RaggedRows, options: AttentionOptions, out: Tensor, lse: Tensor,
    weights: torch.dtype | None = None,
) -> None:  # fmt: skip
    """Element by element: the error that rounding the weights and the result to their dtypes can make.

    With unit roundoff u each rounding of a weight p errs by at most u p, so that the sum errs by u times
    sum(p |v|). Scores and sums in fp32 err by some units of it; 64 covers the dims and scores of these tests. Weights are of q's dtype,
    or of the one that is given.
    """
    n = rows.num_queries
    q64, k64, v64 = (x.detach().cpu().double() for x in (q, k, v))
    options64 = AttentionOptions(
        options.scale, options.window, options.softcap, None if options.sinks is None else options.sinks.cpu().double()
    )
    want, want_lse = reference_attention(q64, Keys(k64, v64, rows.page_table), rows, options64, torch.float64)
    spread, _ = reference_attention(q64, Keys(k64, v64.abs(), rows.page_table), rows, options64, torch.float64)
    unit = torch.finfo(torch.float32).eps / 2
    roundoff = _unit_roundoff(weights or q.dtype, q.device) + _unit_roundoff(out.dtype, q.device) + 64 * unit
    error = (out[:n].cpu().double() - want[:n]).abs()
    # fp16 weights below its smallest normal number have an absolute error instead.
    assert (error <= roundoff * spread[:n] + (1e-6 if q.dtype == torch.float16 else 1e-30)).all(), f"largest error {error.max():.2e}"
    torch.testing.assert_close(lse[:n].cpu().double(), want_lse[:n], rtol=64 * unit, atol=64 * unit)
