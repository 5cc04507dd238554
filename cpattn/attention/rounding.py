"""By how much rounding alone can make a right kernel's result differ: the one bound that all comparisons of kernels use.

Shapes: n queries, Hq heads, D and Dv head dims.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from cpattn.stored import result_dtype

# TF32 has ten bits after the point, and a tensor core cuts off what follows; tanh.approx has about eleven right.
TF32_EPS = 2.0**-10
TANH_ERROR = 2.0**-10


class Sizes(NamedTuple):
    """Of what single queries see, in float64: what errors are in proportion to.

    Attributes:
        score: the largest of ``sum_d |q_d k_d scale|`` over the keys, ``[n, Hq]``.
        k_sum: the largest of ``sum_d |k_d|`` over the keys, ``[n, Hq]``.
        v_mean: ``sum_i w_i |v_i|`` with the weights w of the softmax, ``[n, Hq, Dv]``.
        v_sum: ``sum_i |v_i|``, ``[n, Hq, Dv]``.
        seen: the number of keys, ``[n, 1]``.
    """

    score: Tensor
    k_sum: Tensor
    v_mean: Tensor
    v_sum: Tensor
    seen: Tensor

    @classmethod
    def of_query(cls, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, scale: float, softcap: float | None) -> Sizes:
        """Of one query ``[Hq, D]`` with this LSE ``[Hq]``, sinks included, and the keys and values that it sees, ``[N, Hkv, D or Dv]``."""
        # fp32 is exact enough for a bound, and of long contexts float64 would take too much memory.
        q, k, v, lse = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v, lse))
        # A query without keys may hold anything, as padding does, and none of it enters.
        q_hgd = rearrange(q if len(k) else torch.zeros_like(q), "(h g) d -> h g d", h=k.shape[1])
        scores = torch.einsum("hgd,nhd->hgn", q_hgd, k) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        weights_hgn = torch.exp(scores - rearrange(lse, "(h g) -> h g 1", h=k.shape[1]))
        v_size = v.abs()
        v_mean = torch.einsum("hgn,nhd->hgd", weights_hgn, v_size).flatten(0, 1)
        k_size = k.abs() if len(k) else k.new_zeros(1, *k.shape[1:])
        score = torch.einsum("hgd,nhd->hgn", q_hgd.abs(), k_size).amax(2).flatten() * abs(scale)
        k_sum, v_sum = (x.repeat_interleave(q_hgd.shape[1], dim=0) for x in (k_size.sum(2).amax(0), v_size.sum(0)))
        return cls(*(x.double() for x in (score, k_sum, v_mean, v_sum, lse.new_tensor([len(k)]))))


def rounding_bounds(
    sizes: Sizes, lse: Tensor, dtype: torch.dtype, head_dim: int, softcap: float | None, *, fast: bool, launches: int = 1
) -> tuple[Tensor, Tensor]:
    """The largest error of each element of ``out [n, Hq, Dv]`` and ``lse [n, Hq]``.

    q, k and v are exact in their dtype; e is its eps, E that of the sums (fp32, or fp64 for fp64). ``fast`` allows what
    GPUs do: fp32 is multiplied as TF32, for which e is 2^-10, and a tanh errs by 2^-10. A query sees N keys.

    - A number below the smallest normal one has an absolute error of up to g, its distance to the next.
    - A score errs by at most ``d = (r + D E) S + g sum |k|``, where ``S = sum |q k scale|``: D sums, and r for what a kernel
      rounds before it multiplies. That is q times the scale, so r = e / 2; in TF32 it is q and k, so r = 2 e. Or it is stored keys
      times their scale, which are rounded in the right result, and need not be by a kernel that rounds no q. A softcap has a slope of
      at most 1, and its tanh an error of its own, in proportion to ``C = min(S, softcap)``.
    - An LSE changes by at most as much as the scores do. N terms are summed. What goes into and out of exp and log, of size C
      and LSE, is rounded, twice each, in each of L launches that are merged:
      ``l = d + E (N + 2 C + L (4 + 2 |LSE|))``.
    - A weight w changes by a factor of at most exp(2 l). The dtype rounds weights, values or their sum, and the result, e / 2
      each: 2 e in all with a merge. Weights and result have the error g as well. So an output errs by at most
      ``(2 e + expm1(2 l)) sum w |v| + g (1 + sum |v|)``.

    Args:
        lse: the right one ``[n, Hq]``.
        dtype, head_dim: of q.
        softcap: of the call.
        launches: whose results are merged.
    """
    unit, info = torch.finfo(torch.promote_types(result_dtype(dtype), torch.float32)).eps, torch.finfo(dtype)
    is_tf32 = fast and dtype == torch.float32
    eps = TF32_EPS if is_tf32 else info.eps
    grain = info.smallest_normal * info.eps
    score_error = ((2 * eps if is_tf32 else eps / 2) + head_dim * unit) * sizes.score + grain * sizes.k_sum
    capped = sizes.score
    if softcap is not None:
        capped = capped.clamp(max=softcap)
        score_error = score_error + (TANH_ERROR if fast and dtype != torch.float64 else 4 * unit) * capped
    lse_size = torch.where(lse.isfinite(), lse, 0).double().abs()
    lse_bound = score_error + unit * (sizes.seen + 2 * capped + launches * (4 + 2 * lse_size))
    out_bound = (2 * eps + torch.expm1(2 * lse_bound))[..., None] * sizes.v_mean + grain * (1 + sizes.v_sum)
    return out_bound, lse_bound
