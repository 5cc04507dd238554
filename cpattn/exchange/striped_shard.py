"""What a rank brings of a striped cache to strategies over one shard at a time: a copy, as the new tokens lie elsewhere."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from cpattn.exchange.message import KVFormat, Message
from cpattn.exchange.page_rows import Places, read_rows
from cpattn.exchange.strategy import IO, Setup
from cpattn.keys import Keys
from cpattn.kv_cache import PagedKV
from cpattn.metadata.striped_places import new_rows_in_shards, places_in_shard
from cpattn.moves.moves import Moves, moves_for


class StripedShard(NamedTuple):
    """Of each request what this rank's pages hold of the prefix, and then the new tokens that this rank computes, though others
    will hold them. So spans over it are those over any other shard.

    Attributes:
        copy: memory for it.
        cached: where its rows lie in the pages; new_rows: where new tokens go among them.
    """

    copy: Message
    cached: Places
    new_rows: Tensor
    num_tokens: int
    kv: KVFormat
    moves: Moves

    @classmethod
    def of(cls, setup: Setup, copy: Message) -> StripedShard:
        meta = setup.meta
        new_rows = new_rows_in_shards(meta)[meta.cp_rank]
        return cls(copy, places_in_shard(meta), new_rows, meta.num_tokens, setup.kv, moves_for(setup.problem.device))

    def keys(self, io: IO) -> Keys:
        """Copies all of it."""
        cache = io.cache
        assert isinstance(cache, PagedKV)
        read_rows(self.kv, cache, self.cached, *self.copy.parts)
        self.moves.pack(self.copy.whole, io.k, io.v, self.num_tokens, self.new_rows)
        return self.copy.keys
