"""What a plan is: a batch, options, and the chunks that follow from them. All that is worked out from those is here too."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from cpattn.device_tables import IntArray
from cpattn.errors import PlanError, shown
from cpattn.memo import Memo
from cpattn.metadata.batch import MAX_TOKENS, CheckedBatch, Request, is_integer, parse_prefix_shards
from cpattn.metadata.callers_partition import CallersPartition
from cpattn.metadata.chunks import ByRank, Chunks, most_of_a_share, pairs_of, tokens_by_rank
from cpattn.metadata.partition import MOST_CHUNKS, OWNERS, PARTITIONS, REMAINDERS, Partition, remainders_of
from cpattn.metadata.prefix_ranks import PrefixRanks
from cpattn.metadata.striped import Striped, parse_owner


class Chunk(NamedTuple):
    """A contiguous run of one request's extend tokens that one rank owns: tokens start .. start + length - 1 of them."""

    request: int
    start: int
    length: int
    rank: int


_LIMITS = {
    "cp_size": (2**16, "a plan has tables of all ranks; cp_size is the size of the context-parallel group"),
    "pad_to": (MAX_TOKENS, "row numbers are int32"),
}
_OTHER_PARTITIONS = ", or pass a function of (batch, cp_size) that returns cpattn.Chunks; cpattn.plan takes 'auto' as well"
# Whose queries a rank has: those of its rows in all heads, or of all rows in its heads.
QUERIES = ("rows", "all")
# Of a plan: by window, of which a model has few.
_MOST_REMEMBERED = 16
# Of requests times ranks: int64 tables of up to 2 GiB, of which a plan has several.
MOST_SHARES = 2**27


@dataclass(frozen=True)
class Layout:
    """The layout of a batch over ``cp_size`` ranks: what a :class:`cpattn.Plan` is, without what can be made of it."""

    batch: tuple[Request, ...]
    cp_size: int
    partition: str | Partition = "zigzag"
    remainder: str = "balanced"
    pad_to: int = 1
    prefix_shards: tuple[tuple[int, ...], ...] | None = None
    owner: Striped | None = None
    prefix_ranks: PrefixRanks | None = None
    queries: str = "rows"

    def __post_init__(self) -> None:
        checked = CheckedBatch.of(self.batch)
        pairs = checked.pairs
        for name in ("cp_size", "pad_to"):
            value: Any = getattr(self, name)
            if not is_size(name, value):
                limit, why = _LIMITS[name]
                if is_integer(value) and value > limit:
                    raise PlanError(f"{name}={shown(value)}; the limit is {limit} ({why})")
                raise PlanError(f"{name}={shown(value)}; it must be an integer of at least 1")
            object.__setattr__(self, name, int(value))
        if len(pairs) * self.cp_size > MOST_SHARES:
            raise PlanError(
                f"{len(pairs)} requests over cp_size={self.cp_size} ranks are {len(pairs) * self.cp_size} shares; the limit is "
                f"{MOST_SHARES} (a plan has tables of them); split the batch"
            )
        callers = not isinstance(self.partition, str) and callable(self.partition)
        if not callers:
            _choose(self, "partition", tuple(PARTITIONS), _OTHER_PARTITIONS)
        _choose(self, "remainder", REMAINDERS)
        object.__setattr__(self, "batch", checked)
        if self.prefix_shards is not None:
            shards = parse_prefix_shards(self.prefix_shards, pairs[:, 0], self.cp_size)
            object.__setattr__(self, "prefix_shards", tuple(map(tuple, shards.tolist())))
            self.__dict__["shard_lens"] = frozen(shards)
        if self.prefix_ranks is not None:
            object.__setattr__(self, "prefix_ranks", PrefixRanks.parse(self.prefix_ranks, pairs[:, 0], self.cp_size))
            shards = self.prefix_ranks.counts.copy()
            counts = tuple(map(tuple, shards.tolist()))
            # A plan that was made of another one has their counts beside them.
            if self.owner is not None or self.prefix_shards not in (None, counts):
                other = "prefix_shards" if self.owner is None else f"owner={self.owner}"
                raise PlanError(f"prefix_ranks beside {other}; it says itself which tokens each rank holds, so leave {other} out")
            object.__setattr__(self, "prefix_shards", counts)
            self.__dict__["shard_lens"] = frozen(shards)
        if self.owner is not None:
            parse_owner(self.owner)
            if self.prefix_shards is not None:
                raise PlanError(
                    f"owner={self.owner} beside prefix_shards; the rule says which tokens each rank holds, so leave prefix_shards out"
                )
        _choose(self, "queries", QUERIES)
        if self.all_queries and not self.sharded:
            raise PlanError(
                "queries='all' without an owner, prefix_shards or prefix_ranks: where queries are split by heads, each rank holds keys "
                "that others lack; pass the rule of the cache, such as owner=cpattn.Striped()"
            )
        if self.remainder not in remainders_of(self.partition if isinstance(self.partition, str) else ""):
            which = "a partition of your own" if callers else f"partition={self.partition!r}"
            raise PlanError(f"remainder={self.remainder!r} beside {which}, which says itself where each token goes; leave it out")
        if callers:
            object.__setattr__(self, "partition", CallersPartition.of(self.partition, pairs, self.cp_size))  # type: ignore[arg-type]
        if self.cp_size * self.rows > MAX_TOKENS:
            raise PlanError(
                f"{self.cp_size} ranks of {self.rows} rows are {self.cp_size * self.rows} rows; the limit is {MAX_TOKENS} "
                "(row numbers are int32); split the batch or lower pad_to"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled as its arguments: of the arrays in it the copies could be written to."""
        shards = self.prefix_shards if self.prefix_ranks is None else None
        options = self.partition, self.remainder, self.pad_to, shards, self.owner, self.prefix_ranks, self.queries
        return type(self), (self.batch, self.cp_size, *options)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({len(self.batch)} requests, {self.num_tokens} tokens, cp_size={self.cp_size}, "
            f"partition={self.partition!r}, {f'remainder={self.remainder!r}, ' if self.cuts_alike else ''}pad_to={self.pad_to}, "
            f"rows={self.rows}{self.cache_in_words}{', queries=all' if self.all_queries else ''})"
        )

    @property
    def cache_in_words(self) -> str:
        """How a cache is sharded, for the end of a list; nothing where each rank has all of it."""
        return f", owner={self.owner}" if self.owner is not None else ", sharded prefixes" if self.sharded else ""

    @property
    def is_callers(self) -> bool:
        """Whether a caller's own partition made the chunks, rather than one that has a name."""
        return isinstance(self.partition, CallersPartition)

    @property
    def cuts_alike(self) -> bool:
        """Whether every request is cut alike, and a remainder rule says where the tokens go that this leaves over."""
        return isinstance(self.partition, str) and self.partition in OWNERS

    @property
    def kind(self) -> str:
        """The name of its partition, or that it is a caller's: those may follow each other in a bucket, whatever they are."""
        return self.partition if isinstance(self.partition, str) else "a caller's"

    def may_follow(self, other: Layout) -> bool:
        """Whether it may take the other's place in a bucket, as far as partitions go: those that have names may follow each other, and so
        may callers', of which nothing is known in advance."""
        return self.is_callers == other.is_callers

    @cached_property
    def num_tokens(self) -> int:
        """New tokens in the batch, over all requests and ranks."""
        return int(self.extend_lens.sum())

    @cached_property
    def num_prefix_tokens(self) -> int:
        """Tokens of the batch that lie in the KV cache already."""
        return int(self.prefix_lens.sum())

    @cached_property
    def rank_tokens(self) -> tuple[int, ...]:
        """The tokens (logical rows) of each rank; all of them where each has queries of all."""
        if self.all_queries:
            return (self.num_tokens,) * self.cp_size
        return tuple(self.by_rank.tokens.tolist())

    @cached_property
    def rows(self) -> int:
        """Physical rows: the tokens of the fullest rank, rounded up to a multiple of ``pad_to``. The same on every rank."""
        return -(-max(self.rank_tokens) // self.pad_to) * self.pad_to

    @cached_property
    def rank_chunks(self) -> tuple[int, ...]:
        """The chunks with a token on each rank; whole requests where each has queries of all."""
        if self.all_queries:
            return (int(np.count_nonzero(self.extend_lens)),) * self.cp_size
        return tuple(np.diff(self.by_rank.bounds).tolist())

    @property
    def all_queries(self) -> bool:
        """Whether queries are split by heads, so that each rank has rows of all new tokens. The partition then says who keeps which new
        token, where no ``owner`` does."""
        return self.queries == "all"

    @property
    def sharded(self) -> bool:
        """Whether each rank holds a part of the prefixes only, as ``prefix_shards``, ``prefix_ranks`` or ``owner`` say, not all of them."""
        return self.prefix_shards is not None or self.owner is not None

    @property
    def sharded_by(self) -> str:
        """What says so, in the words of :func:`cpattn.plan`."""
        if self.owner is not None:
            return f"owner={self.owner}"
        return "prefix_shards" if self.prefix_ranks is None else "prefix_ranks"

    @property
    def knows_positions(self) -> bool:
        """Whether it says which tokens of a prefix each rank holds, and not only how many: a window needs that."""
        return not self.sharded or self.owner is not None or self.prefix_ranks is not None

    @cached_property
    def chunks(self) -> tuple[Chunk, ...]:
        """All chunks that hold a token, in the order of the batch and, within a request, of the sequence."""
        return tuple(map(Chunk._make, np.stack(self.chunk_table, axis=1).tolist()))

    @cached_property
    def rank_pairs(self) -> tuple[int, ...]:
        """The query-key pairs that each rank computes: a query at absolute position p sees p + 1 keys. Of queries that are split by
        heads a rank computes all with the keys that it holds: as many as others, in the mean."""
        if self.all_queries:
            each, more = divmod(int(pairs_of(self.chunk_table, self.prefix_lens).sum()), self.cp_size)
            return tuple(each + (rank < more) for rank in range(self.cp_size))
        return tuple(self.by_rank.sums(pairs_of(self.chunk_table, self.prefix_lens)).tolist())

    @property
    def token_imbalance(self) -> float:
        """Tokens of the fullest rank over the mean; 1.0 is perfect, and what an empty batch has."""
        return _max_over_mean(self.rank_tokens)

    @property
    def pair_imbalance(self) -> float:
        """Query-key pairs of the busiest rank over the mean; 1.0 is perfect, and what an empty batch has."""
        return _max_over_mean(self.rank_pairs)

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits, the same on every machine; equal exactly when the plans are equal (BLAKE2b, 128 bits)."""
        digest = hashlib.blake2b(digest_size=16)
        # A change to the rules of the layout must change this number: ranks of two versions then find out.
        digest.update(b"layout 3")
        digest.update(repr((self.cp_size, self.kind, self.remainder, self.pad_to, self.sharded)).encode())
        if self.owner is not None:
            digest.update(repr(self.owner).encode())
        digest.update(self._pairs.astype("<i8").tobytes())
        if self.sharded:
            digest.update(self.shard_lens.astype("<i8").tobytes())
        if self.prefix_ranks is not None:
            digest.update(self.prefix_ranks.to_bytes())
        if self.all_queries:
            digest.update(b"all queries")
        if isinstance(self.partition, CallersPartition):
            digest.update(self.partition.to_bytes())
        return digest.hexdigest()

    # Small numpy arrays that the layers above build their tables from, never written to after they are made.

    @cached_property
    def chunk_table(self) -> Chunks:
        """All chunks as a :class:`cpattn.Chunks`: what ``chunks`` holds, as four arrays. What a partition of your own returns."""
        if isinstance(self.partition, CallersPartition):
            return self.partition.chunks
        assert isinstance(self.partition, str)
        table = PARTITIONS[self.partition](self._pairs, self.cp_size, self.remainder, self.computed_lens)
        return Chunks._make(map(frozen, table))

    @cached_property
    def by_rank(self) -> ByRank:
        """The entries of ``chunk_table`` that each rank owns, and where they lie on it."""
        return ByRank._make(map(frozen, ByRank.of(self.chunk_table, self.cp_size)))

    @property
    def chunk_rows(self) -> IntArray:
        """``[c]`` for each entry of ``chunk_table`` the row at which it begins on the rank that owns it."""
        return self.by_rank.rows

    @cached_property
    def most_chunks(self) -> int:
        """The most chunks of one request that a rank may own, whatever the batch: 2 of zigzag and of whole, 1 of contiguous.
        Of a caller's partition as many as there are in this batch."""
        if isinstance(self.partition, str):
            return MOST_CHUNKS[self.partition]
        return most_of_a_share(self.chunk_table, self.cp_size)

    def chunks_of_share(self, fixed: bool) -> int:
        """:attr:`most_chunks`, or, where its place in a bucket is ``fixed``, of whatever may follow it there."""
        return max(MOST_CHUNKS.values()) if fixed and not self.is_callers else self.most_chunks

    @cached_property
    def memo(self) -> Memo[Hashable, Any]:
        """What others have worked out of it, by keys of their own."""
        return Memo(_MOST_REMEMBERED)

    @property
    def _pairs(self) -> IntArray:
        pairs: IntArray = self.batch.pairs  # type: ignore[attr-defined]  # of a CheckedBatch, as any layout has
        return pairs

    @property
    def prefix_lens(self) -> IntArray:
        """``[num_requests]`` int64."""
        return self._pairs[:, 0]

    @property
    def extend_lens(self) -> IntArray:
        """``[num_requests]`` int64."""
        return self._pairs[:, 1]

    @cached_property
    def total_lens(self) -> IntArray:
        """``[num_requests]`` int64: prefix and extend together."""
        return frozen(self.prefix_lens + self.extend_lens)

    @cached_property
    def shard_lens(self) -> IntArray:
        """``[num_requests, cp_size]`` the prefix tokens of each request that each rank holds; 0 where prefixes are not sharded."""
        if self.owner is not None:
            return frozen(self.owner.held(self.prefix_lens, self.cp_size))
        return frozen(np.zeros((len(self.batch), self.cp_size), dtype=np.int64))

    @cached_property
    def prefix_numbers(self) -> IntArray:
        """``[num_prefix_tokens]`` the number of each token of ``prefix_ranks`` among those of its request on its rank."""
        assert self.prefix_ranks is not None
        return frozen(self.prefix_ranks.numbers())

    @property
    def computed_lens(self) -> IntArray | None:
        """``shard_lens`` where ranks keep what they compute, so that who computes has to be even in what it holds; else None."""
        return self.shard_lens if self.prefix_shards is not None else None

    @cached_property
    def held_lens(self) -> IntArray:
        """``[num_requests, cp_size]`` the tokens of each request that each rank's cache holds after the step, new ones included."""
        if not self.sharded:
            return np.broadcast_to(self.total_lens[:, None], (len(self.batch), self.cp_size))
        return frozen(self.shard_lens + self.rank_extends if self.owner is None else self.owner.held(self.total_lens, self.cp_size))

    @cached_property
    def rank_extends(self) -> IntArray:
        """``[num_requests, cp_size]`` the new tokens of each request that each rank owns."""
        return frozen(tokens_by_rank(self.chunk_table, len(self.batch), self.cp_size))

    @cached_property
    def shard_totals(self) -> IntArray:
        """``[cp_size]`` the tokens that each rank brings to the others: its shard of the prefixes, and the new ones that it computes."""
        return frozen((self.shard_lens + self.rank_extends).sum(axis=0))

    @property
    def largest_shard(self) -> int:
        """The tokens of the rank that brings the most."""
        return int(self.shard_totals.max())


def is_size(name: str, value: Any) -> bool:
    """Whether a value is within the limits of ``cp_size`` or ``pad_to``."""
    return is_integer(value) and bool(1 <= value <= _LIMITS[name][0])


def _choose(layout: Layout, name: str, known: tuple[str, ...], more: str = "") -> None:
    """Puts the plain str in the place of one that equals it: a subclass may print itself otherwise, and the fingerprint is
    made of text. Raises PlanError for any other value."""
    value = getattr(layout, name)
    if not isinstance(value, str) or value not in known:
        raise PlanError(f"{name}={shown(value)} is unknown; choose one of {', '.join(map(repr, known))}{more}")
    object.__setattr__(layout, name, known[known.index(value)])


def frozen(table: IntArray) -> IntArray:
    """The same array, which cannot be written to any more: a plan does not change."""
    table.setflags(write=False)
    return table


def _max_over_mean(values: tuple[int, ...]) -> float:
    total = sum(values)
    return max(values) * len(values) / total if total else 1.0
