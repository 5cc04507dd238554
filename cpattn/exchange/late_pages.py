"""Strategy ``all_gather`` over pages that every rank holds whole, where new keys come while the attention runs.

They come into order, beside the prefixes, which are read in the pages; and once the attention has ended all of them are written to
their slots. Nothing is there before the attention but a rank's own keys, and nothing travels after it.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from cpattn.exchange.attend import Attend
from cpattn.exchange.keys_in_order import drafts_in_order
from cpattn.exchange.late_keys import LateInOrder, LateKeys, late_draft
from cpattn.exchange.page_places import PlacesInOrder, places_in_order, places_in_order_draft
from cpattn.exchange.page_rows import read_rows, write_rows
from cpattn.exchange.rows_of_peers import rows_of_peers
from cpattn.exchange.strategy import IO, Setup
from cpattn.exchange.traveling_keys import Traveling, counted
from cpattn.keys import PREFIX_UNIT
from cpattn.kv_cache import PagedKV
from cpattn.metadata.layout import Layout
from cpattn.problem import Problem
from cpattn.transports.transfer import Transfer

# From so many new tokens on, of which an eighth at most are as many cached ones as have to be put beside them. Between two H200 8k took 480
# us in place of 511, and 8 x (8k + 2k) 2,076 in place of 2,112. What is less than this is expected to gain nothing.
_LATE_TOKENS = 4096
_CACHED_PART = 8


def may_come_late(problem: Problem, plan: Layout, travels: Traveling) -> bool:
    """Whether it is worth it for new keys, where a backend and a transport can, as far as problem and plan go."""
    return problem.cache == "paged" and not plan.sharded and why_not_late(problem, plan, travels) is None


def why_not_late(problem: Problem, plan: Layout, travels: Traveling) -> str | None:
    """Why new keys had better not come late into pages that every rank holds whole, or None.

    A bucket's order would not know how many cached keys there are, and its launches not whether there are any. From so many tokens on an
    eager call hides its host's time, so that a graph has little to give.
    """
    if plan.cp_size == 1 or travels.what == "nothing":
        return "no rank waits for another before its attention"
    if problem.overlap > 1:
        return "overlap= divides heads"
    if problem.fixed:
        return "how many cached keys have to be put beside them changes with a bucket's batch"
    if plan.num_tokens < _LATE_TOKENS:
        return f"{plan.num_tokens:,} new tokens are fewer than {_LATE_TOKENS:,}"
    cached = int((plan.prefix_lens % PREFIX_UNIT)[plan.extend_lens > 0].sum())
    if plan.num_tokens < _CACHED_PART * cached:
        return f"{cached:,} cached keys would have to be put beside {plan.num_tokens:,} new ones"
    return None


class LateIntoPages(NamedTuple):
    """What one call needs."""

    transfers: tuple[Transfer, ...]
    late: LateKeys
    order: LateInOrder
    places: PlacesInOrder
    num_tokens: int | Tensor

    @classmethod
    def of(cls, setup: Setup, travels: Traveling) -> LateIntoPages | None:
        """None where they cannot come late, or had better not."""
        problem, meta, kv = setup.problem, setup.meta, setup.kv
        if not (setup.waits_for_keys and setup.reads_in_place and may_come_late(problem, meta.plan, travels)):
            return None
        if not rows_of_peers(setup, kv):
            return None
        late_rows = late_draft(meta, problem.window, setup.ordered)
        meta.derive_together(late_rows, *drafts_in_order(setup), places_in_order_draft(meta))
        late = LateKeys.of(setup, kv)
        if late is None:
            return None
        transfer = counted(late.transfer, travels, setup)
        return cls((transfer,), late, LateInOrder.of(setup, late), places_in_order(meta), setup.num_tokens)

    def forward(self, io: IO, attend: Attend) -> None:
        """Makes one call."""
        cache, kv = io.cache, self.late.kv
        assert isinstance(cache, PagedKV)
        self.late.put(io.k, io.v, self.num_tokens)
        work = io.start()
        message = self.late.message()
        new, cached, cached_rows = self.places
        if cached is not None:
            read_rows(kv, cache, cached, *message.parts, cached_rows)
        keys = self.order.keys(io, self.late, None)
        # Nothing comes between the launch that brings them and the one that reads them.
        work.wait()
        attend(keys, self.order.spans)
        write_rows(kv, cache, new, *message.parts)
