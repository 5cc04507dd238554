"""How new keys come into pages that every rank holds whole: those that its queries see before the attention, the rest beside or after."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

from torch import Tensor

from cpattn.exchange.gathered_rows import gathered_rows, put_in_pages
from cpattn.exchange.message import KVFormat, Message
from cpattn.exchange.needed_rows import NeededRows, group_buffers, needed_rows
from cpattn.exchange.page_places import Parted, Places, needed_places, parted_drafts, parted_places, rest_rows
from cpattn.exchange.page_rows import as_bytes, write_rows
from cpattn.exchange.rows_of_peers import rows_of_peers
from cpattn.exchange.seen_keys import exchanged_rows
from cpattn.exchange.step_spans import causal_draft
from cpattn.exchange.strategy import Setup
from cpattn.exchange.traveling_keys import Traveling
from cpattn.kv_cache import PagedKV
from cpattn.moves.moves import Moves, moves_for
from cpattn.transports.rows_of_all import Part, RowsOfAll, RowsOfPeers, SentRows
from cpattn.transports.transfer import Transfer


class RowsIntoPages(Protocol):
    """Of one group of heads. One call's use: ``put``, then start ``before`` and ``after``, then wait for ``before`` and
    ``write_seen``; after the attention wait for ``after`` and ``write_rest``. (Where the attention sees keys in order, ``write_seen`` comes
    after it: :mod:`cpattn.exchange.order_into_pages`.)"""

    @property
    def rows(self) -> SentRows:
        """What this rank sends, and what comes for its attention."""

    @property
    def before(self) -> Transfer | None:
        """That brings what has to be there before the attention; None where nothing travels for it, on no rank."""

    @property
    def after(self) -> Transfer | None:
        """That brings the rest; None where it does not travel by itself."""

    @property
    def leaves_rest(self) -> bool:
        """Whether new keys are not in the pages yet once those are that its queries see."""

    def put(self, k: Tensor, v: Tensor | None, num_tokens: int | Tensor) -> None:
        """Says what this rank sends, as :meth:`cpattn.moves.moves.Moves.pack`."""

    def write_seen(self, cache: PagedKV, k: Tensor, v: Tensor | None) -> None:
        """Writes what this rank's queries see; its own rows may be taken from k and v."""

    def write_rest(self, cache: PagedKV) -> None:
        """Writes all else."""


class OneTransfer(NamedTuple):
    """One transfer brings rows before the attention, or lets this rank read them.

    Attributes:
        seen: writes to pages what this rank's queries see, which may be all; rest: all else, or None.
    """

    rows: RowsOfAll
    seen: Callable[[PagedKV], None]
    rest: Callable[[PagedKV], None] | None = None
    after: None = None

    @property
    def before(self) -> Transfer:
        """See :class:`RowsIntoPages`, as for the others."""
        return self.rows.transfer

    @property
    def leaves_rest(self) -> bool:
        return self.rest is not None

    def put(self, k: Tensor, v: Tensor | None, num_tokens: int | Tensor) -> None:
        self.rows.put(k, v, num_tokens)

    def write_seen(self, cache: PagedKV, k: Tensor, v: Tensor | None) -> None:
        self.seen(cache)

    def write_rest(self, cache: PagedKV) -> None:
        if self.rest is not None:
            self.rest(cache)


class AllAfter(NamedTuple):
    """Each rank has what its queries see, and one message brings all rows beside the attention.

    Attributes:
        own: the places of this rank's rows; rest: of all ranks' rows those of the others'.
    """

    kv: KVFormat
    rows: RowsOfAll
    own: Places
    rest: Places
    before: None = None
    leaves_rest: bool = True

    @property
    def after(self) -> Transfer:
        """See :class:`RowsIntoPages`, as for the others."""
        return self.rows.transfer

    def put(self, k: Tensor, v: Tensor | None, num_tokens: int | Tensor) -> None:
        self.rows.put(k, v, num_tokens)

    def write_seen(self, cache: PagedKV, k: Tensor, v: Tensor | None) -> None:
        write_rows(self.kv, cache, self.own, k, v)

    def write_rest(self, cache: PagedKV) -> None:
        put_in_pages(self.rows, self.kv, self.rest, cache)


class SentTwice(NamedTuple):
    """One message to each rank of what its queries see, and one of the rest.

    Attributes:
        rows: bring this rank what it needs; seen: that and its own tokens; places: of those.
        message: the rest for others; outgoing: which of this rank's tokens it has.
        rest: what it receives then; rest_places: of that.
    """

    kv: KVFormat
    rows: NeededRows
    seen: Message
    places: Places
    message: Tensor
    outgoing: Tensor
    rest: Message
    rest_places: Places
    after: Transfer
    moves: Moves
    leaves_rest: bool = True

    @property
    def before(self) -> Transfer | None:
        """See :class:`RowsIntoPages`, as for the others."""
        return self.rows.transfer

    def put(self, k: Tensor, v: Tensor | None, num_tokens: int | Tensor) -> None:
        self.rows.put(k, v, num_tokens)
        if len(self.message):
            self.moves.gather_rows(self.message, self.rows.own, self.outgoing)

    def write_seen(self, cache: PagedKV, k: Tensor, v: Tensor | None) -> None:
        write_rows(self.kv, cache, self.places, *self.seen.parts)

    def write_rest(self, cache: PagedKV) -> None:
        write_rows(self.kv, cache, self.rest_places, *self.rest.parts)


def rows_into_pages(setup: Setup, kv: KVFormat, travels: Traveling) -> Sequence[RowsIntoPages]:
    """Of each group of KV heads; ``kv`` is of one of them."""
    meta, window = setup.meta, setup.problem.window
    peers = rows_of_peers(setup, kv)
    # Those whose queries see them in pages are sent along.
    spans = [causal_draft(meta, paged=True)] if setup.reads_pages else []
    if travels.what == "nothing":
        meta.derive_together(*parted_drafts(meta, window), *spans)
        own, rest = meta.gathered_places_by_rank[meta.cp_rank], parted_places(meta, window).rest
        return [AllAfter(kv, rows, own, rest) for rows in peers or gathered_of(setup, kv)]
    if peers and (travels.what == "needed" or meta.bucket is not None):
        meta.derive_together(*parted_drafts(meta, window), *spans)
        return [_read_twice(kv, rows, parted_places(meta, window)) for rows in peers]
    sent_twice = [] if peers or travels.what == "all" else rows_sent_twice(setup, kv)
    if not sent_twice:
        meta.derive_together(meta.gathered_places_draft, *spans)
    places = meta.gathered_places
    return sent_twice or [OneTransfer(rows, partial(put_in_pages, rows, kv, places)) for rows in peers or gathered_of(setup, kv)]


def _read_twice(kv: KVFormat, rows: RowsOfPeers, places: Parted) -> OneTransfer:
    """Rows in other ranks' memory, of which a rank reads those that its queries see first, and the rest once it has attended."""

    def write(part: Part, places: Places, cache: PagedKV) -> None:
        rows.write_pages(*as_bytes(kv, cache), cache.page_table, *places, part=part)

    return OneTransfer(rows, partial(write, "first", places.seen), partial(write, "last", places.rest))


def gathered_of(setup: Setup, kv: KVFormat) -> Sequence[RowsOfAll]:
    """Over collectives."""
    return gathered_rows(setup.transport, kv, setup.meta.rows, setup.problem.overlap)


def rows_sent_twice(setup: Setup, kv: KVFormat) -> Sequence[RowsIntoPages]:
    """None where the transport cannot send such messages."""
    problem, meta, transport, groups = setup.problem, setup.meta, setup.transport, setup.problem.overlap
    needed = needed_rows(transport, kv, exchanged_rows(meta, problem.window), meta.num_tokens, groups, travel=True)
    if needed is None:
        return []
    table, places = rest_rows(meta, problem.window), needed_places(meta, problem.window)
    memory = group_buffers(transport, "rest", kv, groups, sum(table.received))
    messages = group_buffers(transport, "rest for others", kv, groups, sum(table.sent))
    made = []
    for first, rest, message in zip(needed, memory, messages, strict=True):
        after = transport.prepare_uneven_all_to_all(rest, message, table.received, table.sent)
        assert after is not None  # nor was the first
        after = after._replace(fill_missing=partial(kv.fill_missing_, message))
        rest_of = Message.of(rest, kv), table.places
        made.append(
            SentTwice(kv, first, Message.of(first.memory, kv), places, message, table.outgoing, *rest_of, after, moves_for(kv.device))
        )
    return made
