"""The merging kernel beside its torch twin in float64, with NaN wherever nothing may be read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cpattn.attention.merge import torch_merge_all_

pytest.importorskip("triton")
from cpattn.kernels.merge import merge_all


def case(parts: int, rows: int, heads: int, dim: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Parts with and without keys; LSEs as attention kernels may give them, heads first; out within a wider tensor."""
    torch.manual_seed(parts * 1000 + rows)
    acc = torch.randn(rows, heads, dim, device=device)
    acc_lse = torch.randn(rows, heads, device=device) * 5
    out = torch.randn(parts, rows, heads + 1, dim + 3, device=device).to(dtype)[:, :, 1:, :dim]
    lse = (torch.randn(parts, heads, rows, device=device) * 5).transpose(1, 2)
    acc_lse[torch.rand_like(acc_lse) < 0.3] = -torch.inf
    lse[torch.rand_like(lse) < 0.4] = -torch.inf
    # Whole rows without any keys, and large ones.
    lse[:, :: max(1, rows // 3)] = -torch.inf
    acc_lse[1::5] += 1e4
    lse[:, 1::5] += 1e4
    out[lse == -torch.inf] = torch.nan
    acc[acc_lse == -torch.inf] = torch.nan
    return acc, acc_lse, out, lse


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("dim", [8, 24, 128, 512])
@pytest.mark.parametrize("parts", [1, 2, 7])
def test_merge_all(parts: int, dim: int, dtype: torch.dtype, device: str) -> None:
    acc, acc_lse, out, lse = case(parts, 37, 3, dim, dtype, device)
    before, before_lse = acc.clone(), acc_lse.clone()
    want, want_lse = acc.double(), acc_lse.double()
    torch_merge_all_(want, want_lse, out.double(), lse.double())
    # The sum of what is added bounds its rounding.
    spread = torch.where(acc.isnan(), 0, acc).double().abs() + out.double().abs().nan_to_num().sum(0)
    merge_all(acc, acc_lse, out, lse)
    # A weight exp(x) errs by x units from rounding x; those of LSEs far apart do not count.
    unit = torch.finfo(torch.float32).eps / 2
    changed = (lse > -torch.inf).any(0)
    largest = torch.where(want_lse.isfinite(), want_lse.abs(), 0)
    bound = (64 + 2 * largest) * unit
    assert ((acc.double() - want).abs() <= bound[..., None] * spread)[changed].all()
    assert ((acc_lse.double() - want_lse).abs() <= bound)[changed].all()
    assert torch.equal(acc[~changed].view(torch.int32), before[~changed].view(torch.int32))
    assert torch.equal(acc_lse[~changed], before_lse[~changed])


def test_one_part_into_nothing_is_a_copy(device: str) -> None:
    _, _, out, _ = case(3, 9, 2, 16, torch.bfloat16, device)
    out = out.nan_to_num()
    lse = torch.full((3, 9, 2), -torch.inf, device=device)
    lse[1] = 2.5
    out[0], out[2] = torch.nan, torch.nan
    acc, acc_lse = torch.full((9, 2, 16), torch.nan, device=device), torch.full((9, 2), -torch.inf, device=device)
    merge_all(acc, acc_lse, out, lse)
    assert torch.equal(acc, out[1].float())
    assert torch.equal(acc_lse, lse[1])


def test_nothing_to_merge(device: str) -> None:
    acc, acc_lse, out, lse = case(2, 9, 2, 16, torch.float32, device)
    before, before_lse = acc.clone(), acc_lse.clone()
    merge_all(acc, acc_lse, out[:0], lse[:0])
    merge_all(acc[:0], acc_lse[:0], out[:, :0], lse[:, :0])
    assert torch.equal(acc.view(torch.int32), before.view(torch.int32))
    assert torch.equal(acc_lse, before_lse)
