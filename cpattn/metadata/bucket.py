"""A bucket: the sizes that metadata are padded to, so that a captured CUDA graph can replay any batch that fits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cpattn.errors import PlanError, shown
from cpattn.metadata.batch import MAX_TOKENS, is_integer
from cpattn.metadata.layout import Layout


@dataclass(frozen=True)
class Bucket:
    """The largest batch that metadata of fixed addresses and sizes can hold.

    >>> import cpattn
    >>> bucket = cpattn.Bucket(max_requests=8, max_rows=16, max_chunks=16)
    >>> meta = cpattn.build_metadata([(0, 20)], cp_size=2, cp_rank=0, bucket=bucket)
    >>> meta.rows, meta.num_tokens
    (16, 10)
    >>> meta.copy_(cpattn.plan([(4, 3), (9, 1)], cp_size=2))
    >>> meta.rows, meta.num_tokens
    (16, 2)

    Attributes:
        max_requests: in a batch; what a page table of the bucket has lines.
        max_rows: of each rank, which is what q, k and v of the bucket have.
        max_chunks: with a token, on any one rank. 2 * max_requests is always enough for the partitions that have names.
        max_seqlen: the longest request, prefix included. Kernels that size their work by it are told this number.
    """

    max_requests: int
    max_rows: int
    max_chunks: int
    max_seqlen: int = MAX_TOKENS

    def __post_init__(self) -> None:
        for name in ("max_requests", "max_rows", "max_chunks", "max_seqlen"):
            value: Any = getattr(self, name)
            if not is_integer(value) or not 1 <= value <= MAX_TOKENS:
                raise PlanError(f"{name}={shown(value)}; it must be an integer from 1 to {MAX_TOKENS}")
            # Integers of numpy may be too narrow for products.
            object.__setattr__(self, name, int(value))

    def why_not(self, plan: Layout) -> str | None:
        """What of a plan is too large for this bucket, or None if it fits."""
        if not isinstance(plan, Layout):
            raise PlanError(f"a bucket is asked about a {type(plan).__name__}; pass a Plan, which cpattn.plan makes of a batch")
        needs = {
            "max_requests": len(plan.batch),
            "max_rows": plan.rows,
            "max_chunks": max(plan.rank_chunks),
            "max_seqlen": int(plan.total_lens.max(initial=0)),
        }
        too_large = [
            f"{name} is {getattr(self, name)}, the plan needs {need}" for name, need in needs.items() if need > getattr(self, name)
        ]
        if plan.cp_size * self.max_rows > MAX_TOKENS:
            too_large.append(f"{plan.cp_size} ranks of {self.max_rows} rows are more than {MAX_TOKENS} (row numbers are int32)")
        return "; ".join(too_large) or None

    def check(self, plan: Layout) -> None:
        """Raises PlanError if the plan does not fit; the same on every rank."""
        reason = self.why_not(plan)
        if reason:
            raise PlanError(f"the plan does not fit the bucket: {reason}; ask plan.fits(bucket) and choose a larger one")
