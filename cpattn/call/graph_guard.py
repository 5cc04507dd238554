"""What a captured graph asks of the batches that are put into its bucket later: it cannot look again."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import ref

from cpattn.errors import PlanError
from cpattn.kv_cache import PackedKV, PagedKV
from cpattn.metadata.layout import Layout
from cpattn.transports.transport import Transport


@dataclass(frozen=True)
class CapturedCache:
    """A graph has captured a call with a page table for ``fits`` tokens of a request, or, with None, without any cache. A plan
    that does not go with it is refused."""

    fits: int | None

    @classmethod
    def of(cls, cache: PackedKV | PagedKV | None) -> CapturedCache:
        return cls(cache.page_table.shape[1] * cache.page_size if isinstance(cache, PagedKV) else None)

    def __call__(self, plan: Layout) -> None:
        if self.fits is None:
            if plan.num_prefix_tokens:
                raise PlanError(
                    f"the plan has {plan.num_prefix_tokens} prefix tokens, but a graph was captured without a kv_cache; capture with one"
                )
            return
        longest = int(plan.held_lens.max(initial=0))
        if longest > self.fits:
            raise PlanError(
                f"the plan has a request of {longest} tokens, but a graph was captured with a page table for {self.fits}; "
                "capture with a wider one"
            )


@dataclass(frozen=True)
class GroupCheck:
    """A graph has captured a call over a group. Another batch is refused where a rank did not come meanwhile, as far as the host
    knows, or where the group was given up: ranks that are out of step would take each other's messages for those of a replay. Nothing is
    known of a group that is gone."""

    transport: ref[Transport]

    def __call__(self, plan: Layout) -> None:
        transport = self.transport()
        if transport is not None:
            transport.look_for_fault()
            if transport.state.failure is not None:
                raise transport.state.error()
