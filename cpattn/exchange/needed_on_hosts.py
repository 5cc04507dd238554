"""Keys that the queries of each host's ranks see, which cross to it once, and go from there to those ranks that see them."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from torch import Tensor

from cpattn.exchange.attend import Attend
from cpattn.exchange.keys_in_order import OrderedKeys
from cpattn.exchange.message import KVFormat
from cpattn.exchange.rows_by_hosts import rows_by_hosts
from cpattn.exchange.strategy import IO, Setup
from cpattn.moves.moves import Moves, moves_for
from cpattn.transports.transfer import Transfer


class NeededOnHosts(NamedTuple):
    """What one call needs.

    Attributes:
        rows: memory of this rank's tokens, of what comes across, and of what comes from ranks of its host; own: the first.
        across: the message to other hosts, this rank's tokens, and which of them it has; passed: the same to ranks of its own, of what is
            at hand then.
        source: where each key is that has a place in order.
    """

    transfers: tuple[Transfer, ...]
    rows: Tensor
    own: Tensor
    across: tuple[Tensor, Tensor, Tensor]
    passed: tuple[Tensor, Tensor, Tensor]
    ordered: OrderedKeys
    source: Tensor
    num_tokens: int | Tensor
    moves: Moves

    @classmethod
    def of(cls, setup: Setup, within: int) -> NeededOnHosts | None:
        """Of hosts of so many ranks; None where parts of the transport cannot send such messages."""
        meta, transport, kv = setup.meta, setup.transport, setup.kv
        table = rows_by_hosts(meta, setup.problem.window, within, setup.ordered.leaves_own)
        across, inner = transport.split(transport.size // within, within)

        def buffer(name: str, rows: int) -> Tensor:
            return transport.arena.buffer(f"hosts {name}", (rows, kv.heads, kv.width), kv.wire_dtype, kv.device)

        at_hand = meta.num_tokens + sum(table.received_across)
        rows = buffer("rows", at_hand + sum(table.received_within))
        messages = buffer("across", sum(table.sent_across)), buffer("passed", sum(table.sent_within))
        moves, own, passed = moves_for(setup.problem.device), rows[: meta.num_tokens], (messages[1], rows[:at_hand], table.passed)
        first = across.prepare_uneven_all_to_all(rows[meta.num_tokens : at_hand], messages[0], table.received_across, table.sent_across)
        second = inner.prepare_uneven_all_to_all(rows[at_hand:], messages[1], table.received_within, table.sent_within)
        if first is None or second is None:
            return None
        transfers = (
            first._replace(fill_missing=partial(kv.fill_missing_, messages[0])),
            # What came across is others', and is passed on all the same.
            second._replace(fill_missing=partial(_pass_on_others, kv, moves, own, *passed)),
        )
        return cls(
            transfers=transfers,
            rows=rows,
            own=own,
            across=(messages[0], own, table.outgoing),
            passed=passed,
            ordered=OrderedKeys.of(setup, kv, setup.ordered),
            source=table.source,
            num_tokens=setup.num_tokens,
            moves=moves,
        )

    def forward(self, io: IO, attend: Attend) -> None:
        """Makes one call."""
        if len(self.own):
            self.moves.pack(self.own, io.k, io.v, self.num_tokens)
        _gather(self.moves, *self.across)
        crossing, ordered = io.start(), self.ordered
        if ordered.order.prefix_places is not None:
            # It is there, and the new keys are still on their way.
            ordered.put_prefix(io, None)
        crossing.wait()
        _gather(self.moves, *self.passed)
        io.start().wait()
        ordered.put_new(self.rows, self.source)
        attend(ordered.keys(io, None), ordered.spans)


def _gather(moves: Moves, message: Tensor, rows: Tensor, which: Tensor) -> None:
    if len(message):
        moves.gather_rows(message, rows, which)


def _pass_on_others(kv: KVFormat, moves: Moves, own: Tensor, message: Tensor, rows: Tensor, which: Tensor) -> None:
    """The message to ranks of one's host where one's own tokens are missing."""
    kv.fill_missing_(own)
    _gather(moves, message, rows, which)
