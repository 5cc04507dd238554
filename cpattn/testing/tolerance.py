"""How large an error may be: derived from the error that the same backend makes on one device."""

from __future__ import annotations

import torch
from torch import Tensor

# The share by which splitting the context may raise a backend's own error.
_ALLOWED_GROWTH = 1.05


def rmse(x: Tensor, reference: Tensor) -> float:
    """The root mean square of ``x - reference``, in float64; 0.0 for empty tensors. For LSEs, whose size says nothing.

    >>> rmse(torch.tensor([1.0, 4.0]), torch.tensor([1.0, 2.0]))  # doctest: +ELLIPSIS
    1.414...
    """
    if x.shape != reference.shape:
        raise ValueError(f"x has shape {tuple(x.shape)}, reference {tuple(reference.shape)}; compare tensors of one shape")
    return (x.double() - reference.double()).square().mean().sqrt().item() if x.numel() else 0.0


def relative_rmse(x: Tensor, reference: Tensor) -> float:
    """The root mean square of ``x - reference`` over that of ``reference``, in float64; 0.0 for empty tensors.

    >>> relative_rmse(torch.tensor([1.0, 1.1]), torch.tensor([1.0, 1.0]))  # doctest: +ELLIPSIS
    0.0707...
    """
    error, size = rmse(x, reference), rmse(reference, torch.zeros_like(reference))
    return error / size if size else error


def single_device_bound(dtype: torch.dtype, lse: Tensor, score_size: float = 0.0) -> float:
    """The largest relative RMSE against float64 that a backend may have on one device, without any splitting.

    A half-precision kernel rounds its weights and its result, each to one unit roundoff u of the dtype: 2 * u. What is
    summed in fp32 adds what :func:`rmse_bound` allows for one step.

    >>> 7.8e-3 < single_device_bound(torch.bfloat16, torch.tensor([4.0])) < 7.9e-3
    True

    Args:
        dtype: of q, k and v.
        lse, score_size: as in :func:`rmse_bound`.
    """
    rounding = torch.finfo(dtype).eps if dtype.itemsize < 4 else 0.0
    return rounding + rmse_bound(0.0, dtype, 1, lse, score_size)


def rmse_bound(single_device_rmse: float, dtype: torch.dtype, num_steps: int, lse: Tensor, score_size: float = 0.0) -> float:
    """The largest relative RMSE against float64 that a result may have which was split over ranks.

    1.05 times the same backend's on one device, plus the rounding of the merges. A merge weighs two partial results
    with exp(lse - total). LSEs of size L are known to L * u (u: unit roundoff of the dtype merged in), so two of them
    put 2 * L * u into each weight. The exp, product and sum put in another 3 * u. L is taken in the mean square, as the
    error is. Merges are independent, so their errors add up in squares. Where there is one step, another order of sums still
    costs one such rounding.

    >>> rmse_bound(1e-3, torch.bfloat16, num_steps=1, lse=torch.tensor([4.0])) < 1.051e-3
    True

    Args:
        single_device_rmse: of the same backend with cp_size 1, against the oracle.
        dtype: of q, k and v.
        num_steps: that the strategy takes.
        lse: of the result, for the size of its entries; -inf is passed over.
        score_size: of the largest scores, where LSEs may be far smaller. Beside a sink, a score of size S has a weight
            that is known to S * u, whatever the LSE of both.
    """
    unit_roundoff = torch.finfo(torch.promote_types(dtype, torch.float32)).eps / 2
    finite = lse[lse.isfinite()].double()
    size = max(score_size, finite.square().mean().sqrt().item() if finite.numel() else 0.0)
    return _ALLOWED_GROWTH * single_device_rmse + float(num_steps**0.5 * unit_roundoff * (2 * size + 3))
