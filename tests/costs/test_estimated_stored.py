"""What estimates say of pages in fp8: who reads them, who is given a copy, and by which kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import cpattn

E4M3 = torch.float8_e4m3fn


def of_backend(backend: str, batch: list[tuple[int, int]], **changes: Any) -> cpattn.Estimate:
    """A call on one GPU over pages of 64."""
    plan = cpattn.plan(batch, 1)
    sizes: dict[str, Any] = {"q_heads": 32, "kv_heads": 8, "head_dim": 128, "v_head_dim": 128, "cache": "paged", "page_size": 64}
    problem = cpattn.Problem(torch.device("cuda"), torch.bfloat16, plan.rows, **sizes | changes)
    found = cpattn.estimate(plan, problem, "h100-nvlink")
    return next(
        one for one in found if (one.strategy, one.transport, one.overlap, one.backend) == ("all_gather", "collectives", 1, backend)
    )


def test_decoding_takes_less_than_with_twice_the_bytes_and_prefill_more() -> None:
    decode, prefill = [(8192, 1)] * 256, [(30720, 2048)]
    half, fp8 = (of_backend("triton", decode, kv_dtype=dtype, scales=dtype and "head") for dtype in (None, E4M3))
    assert fp8.graph / half.graph == pytest.approx(0.67, abs=0.04)
    half, fp8 = (of_backend("triton", prefill, kv_dtype=dtype, scales=dtype and "token") for dtype in (None, E4M3))
    assert fp8.compute / half.compute == pytest.approx(1.5, abs=0.05)


def test_a_copy_is_written_and_read_again() -> None:
    """Out of pages as bytes, and then into q's dtype."""
    batch = [(8192, 1)] * 64
    half, fp8 = (of_backend("flash_attn3", batch, kv_dtype=dtype, scales=dtype and "head") for dtype in (None, E4M3))
    tokens, stored, copied = 64 * 8193, 8 * 256, 8 * 512
    moved = tokens * (2 * stored + stored + copied) / cpattn.MACHINES["h100-nvlink"].copy
    assert fp8.compute == pytest.approx(half.compute)
    assert fp8.moves - half.moves == pytest.approx(moved, rel=0.01)


def test_what_the_kernel_for_hopper_cannot_take_costs_as_much_as_the_plain_one() -> None:
    """Rows of 72 bytes are no whole number of what it copies at a time."""
    batch, dims = [(0, 32768)], {"head_dim": 72, "v_head_dim": 72}
    half, fp8 = (of_backend("triton", batch, **dims | {"kv_dtype": dtype, "scales": dtype and "head"}) for dtype in (None, E4M3))
    assert fp8.compute / half.compute == pytest.approx(1.5 * 4 / 3, rel=0.02)
