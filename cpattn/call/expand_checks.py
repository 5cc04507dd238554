"""What is refused of a call whose keys and values are expanded from a latent."""

from __future__ import annotations

from typing import Any

from cpattn.call import checks
from cpattn.call.arguments import Arguments
from cpattn.errors import HeadCountError, OptionError, TensorMismatchError, UnsupportedError, shown
from cpattn.kv_cache import PagedKV
from cpattn.metadata.batch import is_integer
from cpattn.metadata.cp_metadata import CPMetadata


def check_expand(arguments: Arguments, meta: CPMetadata) -> None:
    """What cannot be asked for with ``expand``, in the place of what :func:`cpattn.call.checks.check_qkv` refuses of other calls."""
    expand: Any = arguments.expand
    if not callable(expand):
        raise OptionError(
            f"expand={shown(expand)}; pass a function of (latent [n, 1, L], heads: slice) that returns k [n, h, D] and v [n, h, Dv]"
        )
    q, k, v = arguments.q, arguments.k, arguments.v
    given: Any = k
    for name, x in (("q", q), ("k", given)):
        checks.check_heads(name, x, meta)
    if v is not None:
        raise TensorMismatchError("v is given beside expand; with expand keys and values both come from the latent k: pass v=None")
    checks.check_no_grad(q=q, k=given)
    if not q.dtype.is_floating_point or q.dtype != given.dtype:
        raise TensorMismatchError(f"q is {q.dtype}, the latent k is {given.dtype}; both must be of one floating dtype")
    if given.shape[1] != 1 or 0 in (given.shape[2], q.shape[1], q.shape[2]):
        raise HeadCountError(
            f"q has {q.shape[1]} heads of {q.shape[2]}, k has {given.shape[1]} of {given.shape[2]}; with expand k is a latent that all "
            "query heads share: pass it as [rows, 1, L]"
        )
    v_dim: Any = arguments.v_dim
    if not is_integer(v_dim) or v_dim < 1:
        raise TensorMismatchError(
            f"v_dim={shown(v_dim)}; with expand it says how wide the values are that the latent is expanded to: pass their head dim, an "
            "integer of at least 1"
        )
    if arguments.overlap not in (None, 1):
        raise OptionError(f"overlap={shown(arguments.overlap)}; a latent has one head, and is expanded by groups as it is: leave it out")
    if meta.bucket is not None and isinstance(arguments.kv_cache, PagedKV):
        raise UnsupportedError(
            "expand over the pages of a bucket: latents are expanded out of their pages, as many as the batch has, and a bucket's graph "
            "cannot change in size; use metadata without a bucket, or the absorbed form (without expand)"
        )
