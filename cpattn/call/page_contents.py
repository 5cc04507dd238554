"""What is refused of what pages and their table hold. It means reading the table, and so waiting for a device that has it.

Shapes: ``n`` entries of a table that a batch uses. An entry is a page with the tokens of one request that lie in it: those in
places 0 to ``held - 1``, of which this call writes those from ``first`` on.
"""

from __future__ import annotations

from itertools import combinations
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from cpattn.call.memory_overlap import share_elements
from cpattn.device_tables import expand_runs_on_host
from cpattn.errors import PageTableError
from cpattn.kv_cache import PagedKV
from cpattn.metadata.batch import IntArray
from cpattn.metadata.cp_metadata import CPMetadata

# Of pages of higher numbers several have one mark: a table that is the larger for it would be cleared in every call.
_MOST_MARKS = 2**20


def check_page_contents(cache: PagedKV, meta: CPMetadata, *, written: bool) -> None:
    """Of a cache whose form is right: that its table names pages that exist, and, where this call writes to them, that each
    token has memory of its own."""
    if written:
        check_k_and_v_apart(cache)
    entries = _entries(meta, cache.page_size, cache.page_table.shape[1])
    pages = _pages_of(entries, cache.page_table)
    num_pages = cache.k_pages.shape[0]
    if len(pages) and (pages.min() < 0 or pages.max() >= num_pages):
        wrong = entries.place[(pages < 0) | (pages >= num_pages)].min()
        table = cache.page_table
        hint = _order_hint(table, num_pages, cache.page_size, meta)
        raise PageTableError(_needs(table, int(wrong), cache.page_size, meta, f"there are pages 0 to {num_pages - 1}") + hint)
    if written:
        _check_slots_differ(entries, pages, cache.page_size, cache.page_table.shape[1], meta)


def check_slot_pages(table: Tensor, page_size: int, meta: CPMetadata) -> None:
    """Of a table whose form is right: the same of the pages that this step writes to, whose number is not known."""
    entries = _entries(meta, page_size, table.shape[1])
    pages = _pages_of(entries, table)
    negative = entries.place[: entries.num_written][pages[: entries.num_written] < 0]
    if len(negative):
        hint = _order_hint(table, None, page_size, meta)
        raise PageTableError(_needs(table, int(negative.min()), page_size, meta, "pages are numbered from 0") + hint)
    _check_slots_differ(entries, pages, page_size, table.shape[1], meta)


def check_slots(cache: PagedKV, slots: Tensor) -> None:
    """Of slots and pages that go together: that each row has a slot of its own, within the pages."""
    check_k_and_v_apart(cache)
    num_pages, page_size = cache.k_pages.shape[:2]
    slot = slots.cpu().numpy()
    rows = np.flatnonzero(slot >= 0)
    taken = slot[rows]
    if len(taken) and taken.max() >= num_pages * page_size:
        row = int(rows[taken.argmax()])
        raise PageTableError(
            f"slots[{row}] is {int(slot[row])}, but {num_pages} pages of {page_size} tokens have slots 0 to {num_pages * page_size - 1}; "
            "pass page * page_size + place in the page, or -1 to skip the row"
        )
    # Not cleared, as only what is put there is looked at.
    row_of = np.empty(num_pages * page_size, dtype=np.int32)
    row_of[taken] = rows
    lost = np.flatnonzero(row_of[taken] != rows)
    if len(lost):
        one, other = int(rows[lost[0]]), int(row_of[taken[lost[0]]])
        raise PageTableError(
            f"slots[{one}] and slots[{other}] are both {int(slot[one])}, and a slot holds one token only; give each row a slot of its own, "
            "or -1 to skip it"
        )


def check_k_and_v_apart(cache: PagedKV) -> None:
    """Views of one memory are fine, as long as no element is of both."""
    if cache.v_pages is not None and share_elements(cache.k_pages, cache.v_pages):
        raise PageTableError(
            "kv_cache.k_pages and v_pages have elements in common, so that K and V overwrite each other; pass memory of its own for each, "
            "such as the views pool[:, 0] and pool[:, 1]. Where V is a part of K, pass v=None and v_pages=None"
        )
    if cache.scales == "token":
        # They are written as well.
        written = {name: getattr(cache, name) for name in ("k_pages", "v_pages", "k_scale", "v_scale")}
        for (one, x), (other, y) in combinations(((name, x) for name, x in written.items() if x is not None), 2):
            if share_elements(x, y):
                raise PageTableError(
                    f"kv_cache.{one} and {other} have elements in common, and both are written; pass memory of its own for each"
                )


class _Entries(NamedTuple):
    """Which entries of a table a batch uses: first those that this call writes through, then those that it only reads.

    Attributes:
        place: ``[n]`` where in the flattened table.
        writer: ``[n]`` int32: the entry's number, counted from 1, where this call writes through it; 0 elsewhere.
    """

    place: IntArray
    writer: npt.NDArray[np.int32]
    num_written: int


def _entries(meta: CPMetadata, page_size: int, width: int) -> _Entries:
    """They are the same in every layer, and so kept with the metadata."""
    key = "page table entries", page_size, width
    found: _Entries | None = meta.memo.get(key)
    if found is not None:
        return found
    start, end = _new_tokens(meta)
    stop = -(-end // page_size)
    first_written = np.where(end > start, start // page_size, stop)
    line = np.arange(len(end)) * width
    written = _runs(line + first_written, stop - first_written)
    place = np.concatenate([written, _runs(line, first_written)])
    writer = np.zeros(len(place), dtype=np.int32)
    writer[: len(written)] = np.arange(1, len(written) + 1)
    found = _Entries(place, writer, len(written))
    meta.memo.keep(key, found)
    return found


def _runs(first: IntArray, lengths: IntArray) -> IntArray:
    return expand_runs_on_host(first, lengths, int(lengths.sum())).astype(np.int64)


def _new_tokens(meta: CPMetadata) -> tuple[IntArray, IntArray]:
    """Of each request the tokens that this rank writes: first and last, plus one. In a sharded cache they are counted among those
    that this rank holds."""
    plan, rank = meta.plan, meta.cp_rank
    return plan.shard_lens[:, rank] if plan.sharded else plan.prefix_lens, plan.held_lens[:, rank]


def _pages_of(entries: _Entries, table: Tensor) -> npt.NDArray[np.integer]:
    pages: npt.NDArray[np.integer] = table.cpu().numpy().reshape(-1).take(entries.place)
    return pages


def _needs(table: Tensor, place: int, page_size: int, meta: CPMetadata, rule: str) -> str:
    request, page = divmod(place, table.shape[1])
    needed = -(-int(_new_tokens(meta)[1][request]) // page_size)
    return (
        f"kv_cache.page_table[{request}, {page}] is {int(table[request, page])}, but {rule}; request {request} needs {needed} pages of "
        f"{page_size} tokens with its new ones"
    )


def _order_hint(table: Tensor, num_pages: int | None, page_size: int, meta: CPMetadata) -> str:
    """What to add where the lines have as many pages as the requests need, but in another order."""
    needed = -(-_new_tokens(meta)[1] // page_size)
    numbers = table.cpu().numpy()
    there = (numbers >= 0) & (numbers < (np.iinfo(np.int64).max if num_pages is None else num_pages))
    filled = there.cumprod(axis=1).sum(axis=1)[: len(needed)]
    if (np.sort(filled) < np.sort(needed)).any():
        return ""
    return "; the other lines have the pages for it: are they in the order of the batch?"


def _check_slots_differ(entries: _Entries, pages: npt.NDArray[np.integer], page_size: int, width: int, meta: CPMetadata) -> None:
    """That no slot that is written is another token's as well. Page by page: few pages are in more than one entry, if any, and
    tokens need not be looked at one by one."""
    if not entries.num_written:
        return
    marks = np.zeros(min(1 << int(pages.max()).bit_length(), _MOST_MARKS), dtype=np.int32)
    mark = pages & (len(marks) - 1)
    marks[mark[: entries.num_written]] = entries.writer[: entries.num_written]
    # An entry finds its own number, or 0 if it is only read: unless another one is written that has the same mark.
    doubtful = marks[mark] != entries.writer
    if not doubtful.any():
        return
    among = np.isin(pages, pages[doubtful])
    page, (request, column) = pages[among], np.divmod(entries.place[among], width)
    start, end = _new_tokens(meta)
    held = np.minimum(end[request] - column * page_size, page_size)
    first = np.maximum(start[request] - column * page_size, 0)
    first = np.where(first < held, first, page_size)
    order = np.lexsort((first, page))
    page, request, column, held, first = (x[order] for x in (page, request, column, held, first))
    # All hold their page from its place 0 on, so that the one that writes from the lowest place meets every other, if any does.
    lowest = np.searchsorted(page, page)
    meets = np.flatnonzero((held > first[lowest]) & (np.arange(len(page)) > lowest))
    if not len(meets):
        return
    other, one = int(meets[0]), int(lowest[meets[0]])
    place = int(first[one])

    def token(entry: int) -> str:
        kind = "new" if place >= first[entry] else "cached"
        number = f"{kind} token {int(column[entry]) * page_size + place} of request {int(request[entry])}"
        return f"{number} (counted on this rank)" if meta.plan.sharded else number

    raise PageTableError(
        f"kv_cache.page_table puts {token(one)} and {token(other)} into the same slot, place {place} of page {int(page[one])} "
        f"({page_size} tokens a page), so that one overwrites the other; give one of them a page of its own (copy on write)"
    )
