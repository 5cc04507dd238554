"""The keys that a rank has at hand before anything travels: its new tokens, its shard of a sharded cache, the prefixes."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from cpattn.exchange.attend import Attend
from cpattn.exchange.key_order import Ordered
from cpattn.exchange.message import KVFormat, Message, message_buffer
from cpattn.exchange.page_places import ordered_places
from cpattn.exchange.page_rows import Places, read_rows, write_rows
from cpattn.exchange.step_spans import causal_spans, prefix_spans, spans_in_order
from cpattn.exchange.strategy import IO, Setup
from cpattn.keys import Keys
from cpattn.kv_cache import PackedKV, PagedKV
from cpattn.metadata.striped_places import striped_places
from cpattn.metadata.window_reach import seen_places
from cpattn.moves.moves import Moves, moves_for
from cpattn.spans import Spans


class OwnKeys(NamedTuple):
    """This rank's new tokens, in local order, without a number among them that is not a token's.

    Kernels that load whole tiles would multiply what comes after the tokens by a weight of 0, which is NaN for NaN.

    Attributes:
        cut: how many rows are tokens, where there are others; None where all are.
        padded: memory for a bucket's tokens and zeros after them, as their number changes under a captured graph.
    """

    kv: KVFormat
    cut: int | None
    padded: Message | None
    num_tokens: int | Tensor
    moves: Moves

    @classmethod
    def of(cls, setup: Setup) -> OwnKeys:
        meta, kv, moves = setup.meta, setup.kv, moves_for(setup.problem.device)
        if meta.bucket is not None:
            return cls(kv, None, message_buffer(setup.transport.arena, "own rows", kv, meta.rows), meta.token_count, moves)
        return cls(kv, None if meta.num_tokens == meta.rows else meta.num_tokens, None, meta.num_tokens, moves)

    def keys(self, io: IO) -> Keys:
        """What this rank's tokens bring."""
        if self.padded is not None:
            self.moves.pack(self.padded.whole, io.k, io.v, self.num_tokens)
            return self.padded.keys
        if self.cut is None:
            return self.kv.keys(io.k, io.v)
        return self.kv.keys(io.k[: self.cut], None if io.v is None else io.v[: self.cut])


class PagedKeys(NamedTuple):
    """Keys that lie in pages: attended to as they are, or copied in order for a backend that cannot read those.

    Attributes:
        copy: memory for the copy, or None.
        places: where the copied keys lie in the pages.
    """

    kv: KVFormat
    copy: Message | None
    places: Places | None

    @classmethod
    def as_they_are(cls, kv: KVFormat) -> PagedKeys:
        """In pages that the backend reads."""
        return cls(kv, None, None)

    @classmethod
    def copied(cls, kv: KVFormat, copy: Message, places: Places) -> PagedKeys:
        """In the order of ``places``."""
        return cls(kv, copy, places)

    def keys(self, cache: PagedKV) -> Keys:
        """What to attend to."""
        if self.copy is None or self.places is None:
            return self.kv.keys_in_pages(cache)
        read_rows(self.kv, cache, self.places, *self.copy.parts)
        return self.copy.keys


class OwnShard(NamedTuple):
    """What this rank holds of a cache that is sharded over pages, its new tokens included.

    Attributes:
        new_places: where new tokens go: after what its pages hold of their requests.
        held: all of it, request after request.
    """

    new_places: Places
    held: PagedKeys

    @classmethod
    def of(cls, setup: Setup, copy: Message | None) -> OwnShard:
        meta, kv = setup.meta, setup.kv
        held = PagedKeys.as_they_are(kv) if copy is None else PagedKeys.copied(kv, copy, meta.shard_places)
        return cls(meta.held_places, held)

    def keys(self, io: IO) -> Keys:
        """Writes the new tokens, and gives all that is held."""
        cache = io.cache
        assert isinstance(cache, PagedKV)
        write_rows(self.held.kv, cache, self.new_places, io.k, io.v)
        return self.held.keys(cache)


class HeldShard(NamedTuple):
    """What this rank holds of a sharded cache, in which new tokens lie already."""

    held: PagedKeys

    @classmethod
    def of(cls, setup: Setup) -> HeldShard:
        meta, kv = setup.meta, setup.kv
        if setup.reads_pages:
            return cls(PagedKeys.as_they_are(kv))
        most = int(meta.plan.held_lens.sum(axis=0).max())
        places = meta.shard_places if meta.plan.owner is None else striped_places(meta)
        return cls(PagedKeys.copied(kv, message_buffer(setup.transport.arena, "shard", kv, most), places))

    @classmethod
    def seen_through(cls, setup: Setup, window: int) -> HeldShard:
        """What some query sees of it through a window: a copy, as ranges of such keys begin anywhere, and ranges in pages do not."""
        places = seen_places(setup.meta, window)
        return cls(PagedKeys.copied(setup.kv, message_buffer(setup.transport.arena, "shard", setup.kv, len(places[0])), places))

    def keys(self, io: IO) -> Keys:
        """All of it."""
        assert isinstance(io.cache, PagedKV)
        return self.held.keys(io.cache)


class WholePages(NamedTuple):
    """The keys that this rank's queries see where they lie in pages, and which they see."""

    pages: PagedKeys
    spans: Spans

    @classmethod
    def of(cls, setup: Setup, kv: KVFormat) -> WholePages:
        meta = setup.meta
        if setup.reads_pages:
            return cls(PagedKeys.as_they_are(kv), causal_spans(meta, paged=True))
        # What no query here sees may not be there yet.
        places = ordered_places(meta, setup.problem.window)
        copy = message_buffer(setup.transport.arena, "ordered", kv, len(places[0]))
        return cls(PagedKeys.copied(kv, copy, places), spans_in_order(meta, Ordered.SEEN))

    def keys(self, cache: PagedKV) -> Keys:
        """What to attend to."""
        return self.pages.keys(cache)


class Prefixes(NamedTuple):
    """The prefixes that this rank has whole, in pages or packed, and what its queries see of them."""

    pages: PagedKeys
    spans: Spans

    @classmethod
    def of(cls, setup: Setup) -> Prefixes | None:
        """None where there are none, and never will be."""
        problem, meta, kv = setup.problem, setup.meta, setup.kv
        if problem.cache is None or meta.plan.sharded or (meta.bucket is None and not meta.plan.num_prefix_tokens):
            return None
        reads_pages = problem.cache == "paged" and setup.reads_pages
        spans = prefix_spans(meta, problem.window, paged=reads_pages)
        if problem.cache == "packed" or reads_pages:
            return cls(PagedKeys.as_they_are(kv), spans)
        copy = message_buffer(setup.transport.arena, "prefix", kv, meta.plan.num_prefix_tokens)
        return cls(PagedKeys.copied(kv, copy, meta.prefix_places), spans)

    def attend(self, io: IO, attend: Attend) -> None:
        """Lets this rank's queries see them."""
        cache = io.cache
        assert cache is not None  # there are prefixes
        keys = self.pages.kv.keys(cache.k, cache.v) if isinstance(cache, PackedKV) else self.pages.keys(cache)
        attend(keys, self.spans)
