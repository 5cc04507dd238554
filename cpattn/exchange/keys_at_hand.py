"""The keys that a rank has at hand before anything travels: its new tokens, its shard of a sharded cache, the prefixes."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from cpattn.exchange.attend import Attend
from cpattn.exchange.message import KVFormat, Message, message_buffer
from cpattn.exchange.step_spans import causal_spans, prefix_spans
from cpattn.exchange.strategy import IO, Setup
from cpattn.keys import Keys
from cpattn.kv_cache import PackedKV, PagedKV
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


class OwnShard(NamedTuple):
    """What this rank holds of a cache that is sharded over pages, its new tokens included.

    Attributes:
        new_places: where new tokens go: after what its pages hold of their requests.
        all_places: where all of it lies, request after request.
        copy: memory for a copy of it, where the pages are not attended to as they are.
    """

    kv: KVFormat
    new_places: tuple[Tensor, Tensor]
    all_places: tuple[Tensor, Tensor] | None
    copy: Message | None
    moves: Moves

    @classmethod
    def of(cls, setup: Setup, copy: Message | None) -> OwnShard:
        meta = setup.meta
        all_places = None if copy is None else meta.shard_places
        return cls(setup.kv, meta.held_places, all_places, copy, moves_for(setup.problem.device))

    def keys(self, io: IO) -> Keys:
        """Writes the new tokens, and gives all that is held."""
        cache = io.cache
        assert isinstance(cache, PagedKV)
        self.moves.write_pages(cache.k_pages, cache.v_pages, cache.page_table, *self.new_places, io.k, io.v)
        if self.copy is None or self.all_places is None:
            return self.kv.keys(cache.k_pages, cache.v_pages, cache.page_table)
        self.moves.read_pages(cache.k_pages, cache.v_pages, cache.page_table, *self.all_places, *self.copy.parts)
        return self.copy.keys


class WholePages(NamedTuple):
    """All keys of the batch where they lie in pages, or a copy of them in order for a backend that cannot read those.

    Attributes:
        copy, places: memory for the copy, and where its keys lie in the pages.
    """

    kv: KVFormat
    spans: Spans
    copy: Message | None
    places: tuple[Tensor, Tensor] | None
    moves: Moves

    @classmethod
    def of(cls, setup: Setup, kv: KVFormat) -> WholePages:
        meta, moves = setup.meta, moves_for(setup.problem.device)
        spans = causal_spans(meta, paged=setup.reads_pages)
        if setup.reads_pages:
            return cls(kv, spans, None, None, moves)
        copy = message_buffer(setup.transport.arena, "ordered", kv, meta.plan.num_tokens + meta.plan.num_prefix_tokens)
        return cls(kv, spans, copy, meta.key_places, moves)

    def keys(self, cache: PagedKV) -> Keys:
        """What to attend to."""
        if self.copy is None or self.places is None:
            return self.kv.keys(cache.k_pages, cache.v_pages, cache.page_table)
        self.moves.read_pages(cache.k_pages, cache.v_pages, cache.page_table, *self.places, *self.copy.parts)
        return self.copy.keys


class Prefixes(NamedTuple):
    """The prefixes that this rank has whole.

    Attributes:
        copy, places: memory for those that lie in pages which are not attended to as they are, and where they lie.
    """

    kv: KVFormat
    spans: Spans
    copy: Message | None
    places: tuple[Tensor, Tensor] | None
    moves: Moves

    @classmethod
    def of(cls, setup: Setup) -> Prefixes | None:
        """None where there are none, and never will be."""
        problem, meta = setup.problem, setup.meta
        if problem.cache is None or meta.plan.sharded or (meta.bucket is None and not meta.plan.num_prefix_tokens):
            return None
        moves = moves_for(problem.device)
        reads_pages = problem.cache == "paged" and setup.reads_pages
        spans = prefix_spans(meta, problem.window, paged=reads_pages)
        if problem.cache == "packed" or reads_pages:
            return cls(setup.kv, spans, None, None, moves)
        copy = message_buffer(setup.transport.arena, "prefix", setup.kv, meta.plan.num_prefix_tokens)
        return cls(setup.kv, spans, copy, meta.prefix_places, moves)

    def attend(self, io: IO, attend: Attend) -> None:
        """Lets this rank's queries see them."""
        attend(self._keys(io.cache), self.spans)

    def _keys(self, cache: PackedKV | PagedKV | None) -> Keys:
        if isinstance(cache, PackedKV):
            return self.kv.keys(cache.k, cache.v)
        assert cache is not None
        if self.copy is None or self.places is None:
            return self.kv.keys(cache.k_pages, cache.v_pages, cache.page_table)
        self.moves.read_pages(cache.k_pages, cache.v_pages, cache.page_table, *self.places, *self.copy.parts)
        return self.copy.keys
