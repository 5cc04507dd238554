"""The keys that a rank's queries see, in order in its own memory: new ones as they arrive, cached ones beside them. Those that the
backend reads where they lie stay there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from cpattn.exchange.key_order import KeyOrder, Ordered, key_order, key_order_drafts
from cpattn.exchange.keys_at_hand import OwnKeys
from cpattn.exchange.message import KVFormat, Message, heads_of, message_buffer
from cpattn.exchange.step_spans import in_order_draft, spans_in_order
from cpattn.exchange.strategy import IO, Setup
from cpattn.keys import Arrivals, Keys, OwnRows, PrefixKeys, is_aligned
from cpattn.kv_cache import PackedKV, PagedKV
from cpattn.metadata.draft import Draft
from cpattn.moves.moves import Moves, moves_for
from cpattn.spans import Spans
from cpattn.transports.rows_of_all import RowsInOrder, SentRows


class OrderedKeys(NamedTuple):
    """Memory for the keys of one group of heads, and where they go in it. The attention of a group has read them before the next
    group's take their place.

    Attributes:
        memory: where it is in the call that is under way, as it need not stay from call to call.
    """

    memory: Callable[[], Message]
    order: KeyOrder
    spans: Spans
    moves: Moves

    @classmethod
    def of(cls, setup: Setup, kv: KVFormat, ordered: Ordered) -> OrderedKeys:
        """Of what this rank's queries see, or more; ``kv`` is of one group of heads."""
        # A kernel is not told of memory that is not there, even where it reads nothing of it.
        message = message_buffer(setup.transport.arena, "ordered", kv, max(1, key_order(setup.meta, ordered).rows))
        return cls.within(setup, lambda: message, ordered)

    @classmethod
    def within(cls, setup: Setup, memory: Callable[[], Message], ordered: Ordered) -> OrderedKeys:
        """The same in memory that is there, of as many rows or more."""
        order = key_order(setup.meta, ordered)
        return cls(memory, order, spans_in_order(setup.meta, ordered), moves_for(setup.problem.device))

    def put_prefix(self, io: IO, heads: slice | None) -> None:
        """Cached keys of one group of heads, those that have a place."""
        cache, rows, places = io.cache, self.order.prefix_rows, self.order.prefix_places
        assert isinstance(cache, PackedKV)
        assert places is not None  # or there is nothing to put
        self.moves.pack(self.memory().whole, heads_of(cache.k, heads), heads_of(cache.v, heads), places.shape[0], places, rows)

    def put_new(self, rows: Tensor, source: Tensor) -> None:
        """New keys, those that have a place: of each its row among these."""
        # Where nothing has one there is memory all the same.
        if len(source):
            self.moves.gather_rows(self.memory().whole, rows, source, self.order.new_places)

    def keys(self, io: IO, heads: slice | None, arrivals: Arrivals | None = None) -> Keys:
        """What lies there, and what is read where it lies; with what says which are there, where some come late."""
        keys, kept, rows = self.memory().keys, self.order.kept, self.order.own
        if kept is None and rows is None and arrivals is None:
            return keys
        k, v, page_table, k_scale, v_scale, *_ = keys
        own = None
        if rows is not None:
            assert io.v is not None  # it is not a part of K, or the backend would not read it there
            own = OwnRows(_aligned(heads_of(io.k, heads)), _aligned(heads_of(io.v, heads)), rows)
        # Written out, as _replace() takes three times as long.
        return Keys(k, v, page_table, k_scale, v_scale, arrivals, None if kept is None else _prefix_of(io.cache, heads, kept), own)


def drafts_in_order(setup: Setup, *, as_they_lie: bool = False) -> list[Draft[Any]]:
    """Of the tables of :class:`OrderedKeys`, or of :class:`OwnInPlace`, to be sent together, and with others."""
    meta, ordered = setup.meta, setup.ordered
    return [*key_order_drafts(meta, ordered), in_order_draft(meta, Ordered.SEEN if as_they_lie else ordered)]


class InOrder(NamedTuple):
    """What has arrived, put in order.

    Attributes:
        source: the row of each new token that has a place among those that arrive; negative for a row of zeros.
    """

    ordered: OrderedKeys
    source: Tensor

    @property
    def spans(self) -> Spans:
        """This rank's queries over the keys in order."""
        return self.ordered.spans

    def keys(self, io: IO, arrived: SentRows, heads: slice | None) -> Keys:
        """In order."""
        # It is what was prepared with this.
        cast("RowsInOrder", arrived).gather(self.ordered.memory().whole, self.source, self.ordered.order.new_places)
        return self.ordered.keys(io, heads)


class OwnInOrder(NamedTuple):
    """This rank's own rows, which are all new keys that its queries see: those that share a block with cached ones, or all, are put beside
    these from where they lie."""

    ordered: OrderedKeys
    num_tokens: int

    @property
    def spans(self) -> Spans:
        """This rank's queries over the keys in order."""
        return self.ordered.spans

    def keys(self, io: IO, arrived: SentRows, heads: slice | None) -> Keys:
        """In order; nothing of what may have arrived is looked at."""
        moves, places = self.ordered.moves, self.ordered.order.own_places
        if places is not None:
            moves.pack(self.ordered.memory().whole, heads_of(io.k, heads), heads_of(io.v, heads), self.num_tokens, places)
        return self.ordered.keys(io, heads)


class OwnInPlace(NamedTuple):
    """This rank's own rows where they lie, which is all that its queries see, while others receive some."""

    own: OwnKeys
    spans: Spans

    @classmethod
    def of(cls, setup: Setup) -> OwnInPlace:
        # They lie in the order of all that is seen.
        return cls(OwnKeys.of(setup), spans_in_order(setup.meta, Ordered.SEEN))

    def keys(self, io: IO, arrived: SentRows, heads: slice | None) -> Keys:
        """As they are; nothing of what may have arrived is looked at."""
        if heads is not None:
            # Before it is said what they are: scales of tokens lie behind each head's numbers.
            io = io._replace(k=heads_of(io.k, heads), v=heads_of(io.v, heads))
        return self.own.keys(io)


def _prefix_of(cache: PackedKV | PagedKV | None, heads: slice | None, kept: Tensor) -> PrefixKeys:
    """Some heads of a cache, to be read where they lie."""
    assert cache is not None  # something is kept
    if isinstance(cache, PagedKV):
        assert cache.v_pages is not None  # as below
        return PrefixKeys(cache.k_pages, cache.v_pages, kept, cache.page_table)
    k, v = heads_of(cache.k, heads), heads_of(cache.v, heads)
    assert v is not None  # it is not a part of K, or the backend would not read it there
    return PrefixKeys(_aligned(k), _aligned(v), kept)


def _aligned(x: Tensor) -> Tensor:
    """As a kernel takes cached keys."""
    return x if is_aligned(x) else x.clone(memory_format=torch.contiguous_format)
