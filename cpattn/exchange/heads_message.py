"""What travels where ranks divide heads: q, k and v of a rank's rows to those who have their heads, and results back to the rows' owners.

Shapes: w ranks, n rows of each, R rows of all of them in the order of the batch. Shares of heads may be uneven; a message has room for the
largest, so that all parts of it are of one size.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from cpattn.exchange.head_shares import HeadShare, are_even, largest_share
from cpattn.exchange.message import KVFormat, Message
from cpattn.metadata.united import UnitedRows
from cpattn.moves.moves import Moves, moves_for
from cpattn.problem import Problem
from cpattn.transports.transfer import Transfer
from cpattn.transports.transport import Transport

# Kernels load so many bytes at a time.
_ALIGNMENT = 16


class Widths(NamedTuple):
    """Bytes of one row in the two messages, for one rank's heads: what each hop of the schedule counts.

    Attributes:
        q: of its queries; there: with K and V.
        lse: where the LSE of its result begins; back: of all of the result.
    """

    q: int
    there: int
    lse: int
    back: int

    @classmethod
    def of(cls, problem: Problem, shares: tuple[HeadShare, ...]) -> Widths:
        q_heads, kv_heads = largest_share(shares)
        size = problem.dtype.itemsize
        q = _aligned(q_heads * problem.head_dim * size)
        there = _aligned(q + kv_heads * (problem.key_bytes // problem.kv_heads))
        lse = _aligned(q_heads * problem.v_head_dim * size)
        return cls(q, there, lse, _aligned(lse + q_heads * torch.float32.itemsize))


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


class HeadsThere(NamedTuple):
    """To each rank its heads of all rows.

    Attributes:
        places: where in the message q, K and V go, ``[n, heads, D]`` each, and which heads: for each rank, or, where shares are even, once
            for all, with an axis of ranks in front.
        incoming ``[w * n, width]``: what comes.
        ordered ``[R, width]``: the same in the order of the batch; order: where each of its rows comes from.
        q ``[R, heads, D]``, new: this rank's heads of it.
    """

    transfer: Transfer
    places: tuple[_Place, ...]
    incoming: Tensor
    ordered: Tensor
    order: Tensor
    q: Tensor
    new: Message
    moves: Moves

    @classmethod
    def of(cls, problem: Problem, transport: Transport, rows: UnitedRows, shares: tuple[HeadShare, ...]) -> HeadsThere:
        """Memory and the transfer; ``transport`` is of the ranks that divide heads."""
        size, share, widths = transport.size, shares[transport.rank], Widths.of(problem, shares)
        width = widths.there // problem.dtype.itemsize

        def buffer(name: str, *shape: int) -> Tensor:
            return transport.arena.buffer(f"heads {name}", shape, problem.dtype, problem.device)

        outgoing, incoming = buffer("outgoing", size, problem.rows, width), buffer("incoming", size, problem.rows, width)
        ordered = buffer("ordered", rows.meta.rows, width)
        transfer = transport.prepare_all_to_all(incoming, outgoing)
        q, new = _parts(ordered, share, problem, widths)
        return cls(
            transfer=transfer._replace(fill_missing=partial(_fill_missing, outgoing, shares, problem, widths)),
            places=_places(outgoing, shares, problem, widths),
            incoming=incoming.flatten(0, 1),
            ordered=ordered,
            order=rows.order,
            q=q,
            new=Message.of(new, KVFormat.of(problem)._replace(heads=share.kv_heads)),
            moves=moves_for(problem.device),
        )

    def put(self, q: Tensor, k: Tensor, v: Tensor | None) -> None:
        """Fills the message with what this rank brings. Padding may hold anything: nobody takes it for a key."""
        for place in self.places:
            place.q.copy_(_heads_of(q, place.share.q, place.q))
            place.k.copy_(_heads_of(k, place.share.kv, place.k))
            if v is not None and place.v is not None:
                place.v.copy_(_heads_of(v, place.share.kv, place.v))

    def arrange(self) -> None:
        """Puts what has come in the order of the batch, zeros on padding."""
        self.moves.gather_rows(self.ordered, self.incoming, self.order)


class _Place(NamedTuple):
    """Where a share of the heads lies in a message to one rank, or in those to all."""

    share: HeadShare
    q: Tensor
    k: Tensor
    v: Tensor | None


class HeadsBack(NamedTuple):
    """To each rank the results of its rows, of all heads.

    Attributes:
        out, lse: of all ranks' rows ``[w * n, heads * Dv]`` and ``[w * n, heads]``, as they are sent; back: which rows of the result.
        received: outputs ``[n, heads, Dv]`` and LSE ``[n, heads]`` that come, and which heads: of each rank, or, where shares are even,
            once of all, with an axis of ranks in front.
    """

    transfer: Transfer
    out: Tensor
    lse: Tensor
    back: Tensor
    received: tuple[tuple[HeadShare, Tensor, Tensor], ...]
    moves: Moves

    @classmethod
    def of(cls, problem: Problem, transport: Transport, rows: UnitedRows, shares: tuple[HeadShare, ...]) -> HeadsBack:
        """See :meth:`HeadsThere.of`."""
        share, widths = shares[transport.rank], Widths.of(problem, shares)
        sent, received = (
            transport.arena.buffer(f"heads {end}", (transport.size, problem.rows, widths.back), torch.uint8, problem.device)
            for end in ("sent", "received")
        )
        out, lse = _results(sent.flatten(0, 1), share, problem, widths)
        of_ranks = [(shares[0], received)] if are_even(shares) else zip(shares, received, strict=True)
        transfer = transport.prepare_all_to_all(received, sent)
        return cls(
            transfer=transfer._replace(fill_missing=partial(_fill_results, out, lse)),
            out=out.flatten(1),
            lse=lse,
            back=rows.back,
            received=tuple((share, *_results(message, share, problem, widths)) for share, message in of_ranks),
            moves=moves_for(problem.device),
        )

    def put(self, out: Tensor, lse: Tensor) -> None:
        """Fills the message with the results of all rows in the order of the batch: ``[R, heads, Dv]``, and fp32 ``[R, heads]``."""
        self.moves.gather_rows(self.out, out.flatten(1), self.back)
        if not lse.is_contiguous():
            # Some kernels give it head after head. (A copy, which is done again for further layers.)
            lse = torch.empty_like(lse, memory_format=torch.contiguous_format).copy_(lse)
        self.moves.gather_rows(self.lse, lse, self.back)

    def take(self, out: Tensor, lse: Tensor) -> None:
        """What has come, to ``[n, Hq, Dv]`` and ``[n, Hq]``."""
        for share, from_out, from_lse in self.received:
            _heads_of(out, share.q, from_out).copy_(from_out)
            _heads_of(lse, share.q, from_lse).copy_(from_lse)


def _places(outgoing: Tensor, shares: tuple[HeadShare, ...], problem: Problem, widths: Widths) -> tuple[_Place, ...]:
    kv, places = KVFormat.of(problem), []
    for share, message in [(shares[0], outgoing)] if are_even(shares) else zip(shares, outgoing, strict=True):
        q, new = _parts(message, share, problem, widths)
        if message is outgoing and problem.kv_heads < len(shares):
            # Each KV head goes to all ranks that have some of its query heads.
            new = new.view(problem.kv_heads, len(shares) // problem.kv_heads, *new.shape[1:])
        places.append(_Place(share, q, *kv.parts(new)))
    return tuple(places)


def _heads_of(x: Tensor, heads: slice, like: Tensor) -> Tensor:
    """Of ``[n, all heads, ...]`` some heads; or all of them by rank, ``[w, n, heads, ...]``, as ``like`` has them, or with an axis of one
    more for ranks that share them."""
    shared = like.ndim - x.ndim
    if not shared:
        return x[:, heads]
    count = int(heads.stop - heads.start)
    by_rank = x.view(len(x), x.shape[1] // count, count, *x.shape[2:]).transpose(0, 1)
    return by_rank if shared == 1 else by_rank[:, None]


def _parts(message: Tensor, share: HeadShare, problem: Problem, widths: Widths) -> tuple[Tensor, Tensor]:
    """Of rows ``[..., width]`` the queries ``[..., heads, D]``, and K and V as of :mod:`cpattn.exchange.message`."""
    first, width = widths.q // problem.dtype.itemsize, problem.key_bytes // (problem.kv_heads * problem.dtype.itemsize)
    rows = message.shape[:-1]
    q = message[..., : share.q_heads * problem.head_dim].view(*rows, share.q_heads, problem.head_dim)
    return q, message[..., first : first + share.kv_heads * width].view(*rows, share.kv_heads, width)


def _results(message: Tensor, share: HeadShare, problem: Problem, widths: Widths) -> tuple[Tensor, Tensor]:
    """Of bytes ``[..., width]`` the outputs ``[..., heads, Dv]`` and the LSE ``[..., heads]``."""
    first, shape = widths.lse, (*message.shape[:-1], share.q_heads, problem.v_head_dim)
    out = message[..., : share.q_heads * problem.v_head_dim * problem.dtype.itemsize].view(problem.dtype).view(shape)
    return out, message[..., first : first + share.q_heads * torch.float32.itemsize].view(torch.float32)


def _fill_missing(outgoing: Tensor, shares: tuple[HeadShare, ...], problem: Problem, widths: Widths) -> None:
    """What stands for a rank that failed to bring its rows: whoever sees one of its keys gets NaN, and so do its own queries."""
    outgoing.fill_(torch.nan)
    kv = KVFormat.of(problem)
    for message, share in zip(outgoing, shares, strict=True):
        kv.fill_missing_(_parts(message, share, problem, widths)[1])


def _fill_results(out: Tensor, lse: Tensor) -> None:
    out.fill_(torch.nan)
    lse.fill_(torch.nan)
