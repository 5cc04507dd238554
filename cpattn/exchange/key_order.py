"""The order in which a rank puts the keys that its queries see: each request's in one piece, cached ones before new ones.

Rows of other requests, and of what lies behind this rank's queries, have no place there; nor have keys that are read where they lie:
cached ones, and new ones of requests that no other rank has a part of. A query's own keys lie as they would among all keys, one after
another, so that a row's result has the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from cpattn.device_tables import IntArray, Table, Unsent, exclusive_cumsum, unsent_runs
from cpattn.exchange.own_places import own_places_draft
from cpattn.exchange.seen_keys import seen_keys
from cpattn.keys import NOT_HERE, PREFIX_UNIT
from cpattn.metadata.cp_metadata import CPMetadata
from cpattn.metadata.draft import Draft
from cpattn.metadata.layout import Layout
from cpattn.metadata.needed_keys import Pieces
from cpattn.metadata.own_keys import beside_cached, only_owners, own_begins, tokens_before


class Ordered(IntEnum):
    """Which keys have rows in a rank's order; as a number the form of a message in it (:class:`cpattn.transports.posted.Posted`)."""

    SEEN = 1
    """All that its queries see."""
    NOT_IN_PLACE = 2
    """Those, without the ones that are read where they lie: cached ones, and new ones of requests that are whole on the rank; all but those
    that share a block with keys of the other kind."""
    ALL_NEW = 3
    """New keys that no query of the rank sees as well, since its pages want all of them, and cached ones as before."""

    @property
    def leaves_own(self) -> bool:
        """Whether those new ones are read in the rank's own rows."""
        return self is Ordered.NOT_IN_PLACE


class RequestRows(NamedTuple):
    """Where each request's rows are; int64 ``[num_requests]`` on the host.

    Attributes:
        kept: how many of its cached keys are read where they lie, its first ones; put: how many have rows, which follow those in turn.
        new: how many of its new ones have rows, after those. (In a bucket those that are read in own rows have some too, which nobody
            fills.)
        own: from which key on new ones are read in own rows, which follow those; :data:`cpattn.keys.NOT_HERE` where none are.
        begins: its first row.
        all_own: whether the rank's own tokens are all new ones of which this tells, wherever they are read.
    """

    kept: IntArray
    put: IntArray
    new: IntArray
    own: IntArray
    begins: IntArray
    all_own: bool

    @classmethod
    def of(cls, meta: CPMetadata, ordered: Ordered) -> RequestRows:
        """Of one rank, worked out once for a batch. A bucket's messages are of its size, and so is this: all new keys have rows, and
        there are no cached ones."""
        found: RequestRows | None = meta.memo.get(("request rows", ordered))
        return found or meta.memo.keep(("request rows", ordered), cls._of(meta, ordered))

    @classmethod
    def _of(cls, meta: CPMetadata, ordered: Ordered) -> RequestRows:
        plan: Layout = meta.plan
        own = own_begins(plan, meta.cp_rank) if ordered.leaves_own else np.full_like(plan.extend_lens, NOT_HERE)
        if meta.bucket is not None:
            none = np.zeros_like(plan.extend_lens)
            return cls(none, none, plan.extend_lens, own, exclusive_cumsum(plan.extend_lens), False)
        if ordered is Ordered.ALL_NEW:
            prefix, new = plan.prefix_lens * (plan.extend_lens > 0), plan.extend_lens
        else:
            seen = seen_keys(meta, window=None)
            prefix, new = seen.prefix_len, seen.new_len
        put, all_own = _put_of(prefix, ordered), int(new.sum()) == meta.num_tokens
        new = np.minimum(new, own - plan.prefix_lens)
        return cls(prefix - put, put, new, own, exclusive_cumsum(put + new), all_own)

    @property
    def are_own(self) -> bool:
        """Whether the rank's own rows, as they lie, are all that its queries see."""
        return self.all_own and not self.put.any() and not self.kept.any()

    @property
    def k_starts(self) -> IntArray:
        """Where each request's first key is, or would be: key ``s`` is in row ``k_starts + s``."""
        return self.begins - self.kept

    @property
    def new_starts(self) -> IntArray:
        """Where its first new one is."""
        return self.begins + self.put

    def tokens_put(self, plan: Layout, pieces: Pieces) -> IntArray:
        """``[p]`` how many tokens of each piece, its first ones, are put in rows."""
        return tokens_before(plan, pieces, self.own)


class RowsOfRanks(NamedTuple):
    """Of all ranks at once, so that each knows where the others' rows are.

    Attributes:
        new_starts: where each request's first new key is; int64 ``[cp_size, num_requests]``.
        most: rows of the rank that has the most.
    """

    new_starts: IntArray
    most: int

    @classmethod
    def of(cls, meta: CPMetadata, ordered: Ordered) -> RowsOfRanks:
        """See :meth:`RequestRows.of`."""
        found: RowsOfRanks | None = meta.memo.get(("rows of ranks", ordered))
        return found or meta.memo.keep(("rows of ranks", ordered), cls._of(meta, ordered))

    @classmethod
    def _of(cls, meta: CPMetadata, ordered: Ordered) -> RowsOfRanks:
        plan: Layout = meta.plan
        if meta.bucket is not None or ordered is Ordered.ALL_NEW:
            # The same on all ranks.
            rows = RequestRows.of(meta, ordered)
            most = meta.whole_rows if meta.bucket is not None else int((rows.put + rows.new).sum())
            return cls(rows.new_starts[None].repeat(plan.cp_size, axis=0), most)
        request, start, length, rank = plan.chunk_table
        new = np.zeros((plan.cp_size, len(plan.batch)), dtype=np.int64)
        np.maximum.at(new, (rank, request), start + length)
        prefix = plan.prefix_lens * (new > 0)
        put = _put_of(prefix, ordered)
        if ordered.leaves_own:
            is_whole = only_owners(plan) == np.arange(plan.cp_size)[:, None]
            new = np.where(is_whole, np.minimum(new, beside_cached(plan)), new)
        ends = (put + new).cumsum(axis=1)
        return cls(ends - new, int(ends[:, -1:].max(initial=0)))


def _put_of(prefix: IntArray, ordered: Ordered) -> IntArray:
    """How many of so many cached keys have rows."""
    return prefix if ordered is Ordered.SEEN else prefix % PREFIX_UNIT


def puts_cached_keys(plan: Layout, ordered: Ordered) -> bool:
    """Whether some rank puts cached keys in its rows."""
    return bool((_put_of(plan.prefix_lens, ordered)[plan.extend_lens > 0] > 0).any())


class KeyOrder(NamedTuple):
    """What the keys of one rank's metadata are put in order by. Index tensors are int32 on its device; a negative entry stands for a
    row that has no place.

    Attributes:
        rows: of the memory that it is about.
        are_own: whether they are this rank's own rows as they lie, and all that its queries see; new_are_own: the same of the new
            ones among them, which then lie in its order.
        new_places ``[n]``: of each new token that has a place that place; None where new tokens alone have one, in turn.
        own_places ``[meta.num_tokens]``: of each of this rank's tokens its place, where ``new_are_own``; None where none has one.
        prefix_rows, prefix_places ``[n]``: of each cached token that has a place its row in the cache, and that place; None where none has
            one. ``prefix_rows`` is None also where all have one, in turn.
        kept ``[2 * num_requests]``: of those that are read where they lie; see :class:`cpattn.keys.PrefixKeys`. None where none is.
        own: of those that are read in own rows; see :class:`cpattn.keys.OwnRows`. None where none is, and none ever will be.
    """

    rows: int
    are_own: bool
    new_are_own: bool
    new_places: Tensor | None
    own_places: Tensor | None
    prefix_rows: Tensor | None
    prefix_places: Tensor | None
    kept: Tensor | None
    own: Tensor | None


def key_order(meta: CPMetadata, ordered: Ordered) -> KeyOrder:
    """See :meth:`RequestRows.of`."""
    if meta.bucket is None:
        return meta.derive_sent(Draft(("key order", ordered), lambda: _key_order(meta, ordered)))
    own = meta.derive_sent(own_places_draft(meta)) if ordered.leaves_own else None
    return KeyOrder(meta.whole_rows, False, False, None, None, None, None, None, own)


def key_order_drafts(meta: CPMetadata, ordered: Ordered) -> list[Draft[Any]]:
    """Of its tables, to be sent with others."""
    if meta.bucket is None:
        return [Draft(("key order", ordered), lambda: _key_order(meta, ordered))]
    return [own_places_draft(meta)] if ordered.leaves_own else []


def _key_order(meta: CPMetadata, ordered: Ordered) -> Unsent[KeyOrder]:
    plan: Layout = meta.plan
    kept, put, new, own, begins, all_own = rows = RequestRows.of(meta, ordered)
    num_put, num_new = int(put.sum()), int(new.sum())
    are_own = rows.are_own
    runs = {}
    if all_own and num_new and not are_own:
        pieces = Pieces.whole(plan).take(plan.by_rank.entries(meta.cp_rank))
        many, request = rows.tokens_put(plan, pieces), plan.chunk_table.request[pieces.entry]
        first, rest = (rows.new_starts - exclusive_cumsum(plan.extend_lens))[request] + pieces.token, pieces.length - many
        runs["own"] = np.stack([first, -rest], axis=1).ravel(), np.stack([many, rest], axis=1).ravel()
    if num_put:
        runs["new"] = rows.new_starts, new
        # Those without a place, kept or not seen, come first in each request.
        if (put < plan.prefix_lens).any():
            runs["prefix rows"] = exclusive_cumsum(plan.prefix_lens) + plan.prefix_lens - put, put
        runs["prefix"] = begins, put
    places = unsent_runs(runs, meta.device)
    in_place: dict[str, Table] = {}
    if kept.any():
        cached = exclusive_cumsum(plan.prefix_lens)
        in_place["kept"] = np.stack([kept, cached], axis=1).ravel()
    if (own < plan.total_lens).any():
        in_place |= own_places_draft(meta).make().tables

    def finish(sent: Mapping[str, Tensor]) -> KeyOrder:
        found = places.finish({name: sent[name] for name in places.tables})
        by_kind = found.get("new"), found.get("own"), found.get("prefix rows"), found.get("prefix")
        return KeyOrder(num_put + num_new, are_own, all_own, *by_kind, sent.get("kept"), sent.get("places"))

    return Unsent({**places.tables, **in_place}, finish)
