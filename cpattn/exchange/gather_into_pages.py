"""Strategy ``all_gather`` over pages that every rank holds whole: new keys are written to their slots, and attended to there, or in order
before they are written (:mod:`cpattn.exchange.order_into_pages`).

What a rank's queries see is there before its attention. The rest of the new keys travels beside it, or is read after it, and lies in the
pages before anything that comes later on the stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cpattn.exchange.attend import Attend
from cpattn.exchange.head_groups import HeadGroup, attend_to_group, head_groups
from cpattn.exchange.keys_at_hand import WholePages
from cpattn.exchange.keys_in_order import InOrder, OwnInPlace
from cpattn.exchange.message import KVFormat, heads_of, pages_of_heads
from cpattn.exchange.order_into_pages import rows_through_order
from cpattn.exchange.page_places import Places, hole_places
from cpattn.exchange.page_rows import write_rows
from cpattn.exchange.rows_into_pages import RowsIntoPages, rows_into_pages
from cpattn.exchange.strategy import IO, Setup
from cpattn.exchange.traveling_keys import Traveling, counted
from cpattn.kv_cache import PagedKV
from cpattn.transports.transfer import Transfer, Work


class Holes(NamedTuple):
    """Slots between keys that windows reach. Kernels load whole tiles, and would multiply what lies there by a weight of 0, which is
    NaN for NaN: until the rest comes there are zeros.

    Attributes:
        row: of zeros, a message ``[1, Hkv, width]``.
    """

    kv: KVFormat
    places: Places
    row: Tensor

    @classmethod
    def of(cls, setup: Setup) -> Holes:
        """Of a problem with a window."""
        problem, meta, kv = setup.problem, setup.meta, setup.kv
        assert problem.window is not None
        shape = 1, kv.heads, kv.width
        # Kept with the metadata, as a graph may outlive what was prepared for a batch.
        row = meta.derive(("a row of zeros", shape, kv.dtype), lambda: torch.zeros(shape, dtype=kv.wire_dtype, device=meta.device))
        return cls(kv, hole_places(meta, problem.window), row)

    def fill(self, cache: PagedKV) -> None:
        """With zeros."""
        write_rows(self.kv, cache, self.places, *self.kv.parts(self.row.expand(len(self.places[0]), -1, -1)))


class InPages(NamedTuple):
    """What a rank's queries see is written to the pages, and attended to there."""

    keys: WholePages

    def attend(self, attend: Attend, io: IO, cache: PagedKV, rows: RowsIntoPages, group: HeadGroup) -> None:
        """To the keys of a group of heads, which have come; ``cache`` is theirs."""
        _write_seen(io, cache, rows, group)
        attend_to_group(attend, self.keys.keys(cache), self.keys.spans, group)


class BeforePages(NamedTuple):
    """It is attended to in order, or in this rank's own rows, and then written: :mod:`cpattn.exchange.order_into_pages`."""

    keys: InOrder | OwnInPlace

    def attend(self, attend: Attend, io: IO, cache: PagedKV, rows: RowsIntoPages, group: HeadGroup) -> None:
        """As of :class:`InPages`."""
        attend_to_group(attend, self.keys.keys(io, rows.rows, group.kv_heads), self.keys.spans, group)
        _write_seen(io, cache, rows, group)


def _write_seen(io: IO, cache: PagedKV, rows: RowsIntoPages, group: HeadGroup) -> None:
    rows.write_seen(cache, heads_of(io.k, group.kv_heads), heads_of(io.v, group.kv_heads))


class GatherIntoPages(NamedTuple):
    """What one call needs.

    Attributes:
        transfers: all that is needed before the attention, and then the rest.
        rows: of each group of heads.
        seen: where the attention sees them, and when they are written.
        holes: what is between keys that are seen in pages and is not there yet.
    """

    transfers: tuple[Transfer, ...]
    rows: Sequence[RowsIntoPages]
    groups: Sequence[HeadGroup]
    seen: InPages | BeforePages
    holes: Holes | None
    num_tokens: int | Tensor

    @classmethod
    def of(cls, setup: Setup, travels: Traveling) -> GatherIntoPages:
        kv = setup.kv.group(setup.problem.overlap)
        rows: Sequence[RowsIntoPages]
        seen: InPages | BeforePages
        holes = None
        if setup.writes_pages_after(setup.problem, setup.meta.plan):
            rows, keys = rows_through_order(setup, kv, travels)
            seen = BeforePages(keys)
        else:
            rows, seen = rows_into_pages(setup, kv, travels), InPages(WholePages.of(setup, kv))
            if setup.problem.window is not None and setup.reads_pages and rows[0].leaves_rest:
                holes = Holes.of(setup)
        in_turn = [*(group.before for group in rows), *(group.after for group in rows)]
        return cls(
            transfers=tuple(counted(transfer, travels, setup) for transfer in in_turn if transfer is not None),
            rows=rows,
            groups=head_groups(setup.problem),
            seen=seen,
            holes=holes,
            num_tokens=setup.num_tokens,
        )

    def forward(self, io: IO, attend: Attend) -> None:
        """Makes one call."""
        assert isinstance(io.cache, PagedKV)
        before = []
        for rows, (kv_heads, _) in zip(self.rows, self.groups, strict=True):
            rows.put(heads_of(io.k, kv_heads), heads_of(io.v, kv_heads), self.num_tokens)
            before.append(_start(io, rows.before))
        after = [_start(io, rows.after) for rows in self.rows]
        if self.holes is not None:
            self.holes.fill(io.cache)
        for rows, group, work in zip(self.rows, self.groups, before, strict=True):
            cache = pages_of_heads(io.cache, group.kv_heads)
            if work is not None:
                work.wait()
            self.seen.attend(attend, io, cache, rows, group)
        for rows, group, work in zip(self.rows, self.groups, after, strict=True):
            if work is not None:
                work.wait()
            rows.write_rest(pages_of_heads(io.cache, group.kv_heads))


def _start(io: IO, transfer: Transfer | None) -> Work | None:
    return None if transfer is None else io.start()
