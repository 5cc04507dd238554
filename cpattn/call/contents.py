"""What is looked at of the numbers in tables, scales and new rows, and when. It means reading them: a CPU does so in every call, a GPU
with ``check``."""

from __future__ import annotations

from torch import Tensor

from cpattn.call.page_contents import check_page_contents
from cpattn.call.stored_contents import check_new_fit, check_scales_of_heads
from cpattn.kv_cache import PagedKV
from cpattn.metadata.cp_metadata import CPMetadata


def check_shared_contents(cache: PagedKV, meta: CPMetadata, *, written: bool) -> None:
    """What ranks have alike, before anything is sent: scales of heads, and the page table where each rank has all tokens."""
    check_scales_of_heads(cache)
    if not meta.plan.sharded:
        check_page_contents(cache, meta, written=written)


def check_own_contents(cache: PagedKV, k: Tensor | None, v: Tensor | None, meta: CPMetadata) -> None:
    """What each rank has for itself: the pages of its part of a sharded cache, and new keys and values that pages have to hold; k is None
    where nothing is written. Without ``check`` it is looked at in the midst of the call, so that other ranks do not wait for one that
    refuses its own."""
    if meta.plan.sharded:
        check_page_contents(cache, meta, written=k is not None)
    if k is not None and k.dtype != cache.k_pages.dtype:
        check_new_fit(k, v, cache, meta)
