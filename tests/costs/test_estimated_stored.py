"""What estimates say of pages in fp8: who reads them, who is given a copy, and by which kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from references.measured_tables import batch_of, number, table

import cpattn

E4M3 = torch.float8_e4m3fn


def of_backend(backend: str, batch: Sequence[tuple[int, int]], **changes: Any) -> cpattn.Estimate:
    """A call on one GPU over pages of 64."""
    plan = cpattn.plan(batch, 1)
    sizes: dict[str, Any] = {"q_heads": 32, "kv_heads": 8, "head_dim": 128, "v_head_dim": 128, "cache": "paged", "page_size": 64}
    problem = cpattn.Problem(torch.device("cuda"), torch.bfloat16, plan.rows, **sizes | changes)
    found = cpattn.estimate(plan, problem, "h100-nvlink")
    return next(
        one for one in found if (one.strategy, one.transport, one.overlap, one.backend) == ("all_gather", "collectives", 1, backend)
    )


# One of two warpgroups is left out there since that table was measured (hopper_forms.md).
SINCE = {("decode 256 x (8k + 1)", "token"): 0.96}


@pytest.mark.parametrize("batch", ["decode 256 x (8k + 1)", "8 x (8k + 2k)", "1 x 32k"])
@pytest.mark.parametrize("scales", ["head", "token"])
def test_decoding_takes_less_than_with_twice_the_bytes_and_prefill_more(batch: str, scales: str) -> None:
    """As measured over pages, by what a scale belongs to."""
    measured = {row["call"]: number(row["p50"]) for row in table("fp8_pages_gpu") if row["batch"] == batch}
    half, fp8 = (
        of_backend("triton", batch_of(batch.removeprefix("decode ")), kv_dtype=dtype, scales=dtype and scales) for dtype in (None, E4M3)
    )
    expected = measured[f"attend, triton, fp8, scales of {scales}s"] / measured["attend, triton, bf16"] * SINCE.get((batch, scales), 1.0)
    assert fp8.compute / half.compute == pytest.approx(expected, rel=0.04)


def test_keys_in_another_half_precision_are_converted_without_scales() -> None:
    kernel = cpattn.MACHINES["h100-nvlink"].kernels[0]
    plain, half = (of_backend("triton", [(0, 32768)], kv_dtype=dtype) for dtype in (None, torch.float16))
    assert half.compute / plain.compute == pytest.approx(kernel.stored, rel=0.01)


def test_a_copy_is_written_and_read_again() -> None:
    """Out of pages as bytes, and then into q's dtype."""
    batch = [(8192, 1)] * 64
    half, fp8 = (of_backend("flash_attn3", batch, kv_dtype=dtype, scales=dtype and "head") for dtype in (None, E4M3))
    tokens, stored, copied = 64 * 8193, 8 * 256, 8 * 512
    moved = tokens * (2 * stored + stored + copied) / cpattn.MACHINES["h100-nvlink"].copy
    assert fp8.compute == pytest.approx(half.compute)
    assert fp8.moves - half.moves == pytest.approx(moved, rel=0.01)


@pytest.mark.parametrize("scales", ["head", "token"])
def test_what_the_kernel_for_hopper_cannot_take_costs_as_much_as_the_plain_one(scales: str) -> None:
    """Rows of 72 bytes are no whole number of what it copies at a time."""
    batch, dims = [(0, 32768)], {"head_dim": 72, "v_head_dim": 72}
    half, fp8 = (of_backend("triton", batch, **dims | {"kv_dtype": dtype, "scales": dtype and scales}) for dtype in (None, E4M3))
    measured = {row["call"]: number(row["p50"]) for row in table("fp8_pages_gpu") if row["batch"] == "1 x 32k"}
    expected = measured[f"attend, triton's plain kernel, fp8, scales of {scales}s"] / measured["attend, triton, bf16"]
    assert fp8.compute / half.compute == pytest.approx(expected, rel=0.03)
