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
        outgoing, incoming: ``[w, n, width]``.
        ordered ``[R, width]``: what has come, in the order of the batch; order: where each of its rows comes from.
        q ``[R, heads, D]``, new: this rank's heads of it.
    """

    transfer: Transfer
    outgoing: Tensor
    incoming: Tensor
    ordered: Tensor
    order: Tensor
    q: Tensor
    new: Message
    shares: tuple[HeadShare, ...]
    is_even: bool
    kv: KVFormat
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
        kv = KVFormat.of(problem)._replace(heads=share.kv_heads)
        transfer = transport.prepare_all_to_all(incoming, outgoing)
        q, new = _parts(ordered, share, problem, widths)
        return cls(
            transfer=transfer._replace(fill_missing=partial(_fill_missing, outgoing, shares, problem, widths)),
            outgoing=outgoing,
            incoming=incoming.flatten(0, 1),
            ordered=ordered,
            order=rows.order,
            q=q,
            new=Message.of(new, kv),
            shares=shares,
            is_even=are_even(shares),
            kv=kv,
            moves=moves_for(problem.device),
        )

    def put(self, q: Tensor, k: Tensor, v: Tensor | None, problem: Problem) -> None:
        """Fills the message with what this rank brings. Padding may hold anything: nobody takes it for a key."""
        widths = Widths.of(problem, self.shares)
        if not self.is_even:
            for message, share in zip(self.outgoing, self.shares, strict=True):
                to_q, to_kv = _parts(message, share, problem, widths)
                to_q.copy_(q[:, share.q])
                for to, x in zip(self.kv.parts(to_kv), (k, v), strict=True):
                    if to is not None and x is not None:
                        to.copy_(x[:, share.kv])
            return
        size, share = len(self.shares), self.shares[0]
        to_q, to_kv = _parts(self.outgoing, share, problem, widths)
        to_q.copy_(_by_rank(q, share.q_heads))
        for to, x in zip(self.kv.parts(to_kv), (k, v), strict=True):
            if to is None or x is None:
                continue
            if problem.kv_heads >= size:
                to.copy_(_by_rank(x, share.kv_heads))
            else:
                # Each KV head goes to all ranks that have some of its query heads.
                to.view(problem.kv_heads, size // problem.kv_heads, *to.shape[1:]).copy_(x.transpose(0, 1)[:, None, :, None])

    def arrange(self) -> None:
        """Puts what has come in the order of the batch, zeros on padding."""
        self.moves.gather_rows(self.ordered, self.incoming, self.order)


class HeadsBack(NamedTuple):
    """To each rank the results of its rows, of all heads.

    Attributes:
        out, lse: of all ranks' rows ``[w * n, heads * Dv]`` and ``[w * n, heads]``, as they are sent; back: which rows of the result.
        received: of this rank's rows, what each rank sends, bytes ``[w, n, width]``.
    """

    transfer: Transfer
    out: Tensor
    lse: Tensor
    back: Tensor
    received: Tensor
    shares: tuple[HeadShare, ...]
    is_even: bool
    moves: Moves

    @classmethod
    def of(cls, problem: Problem, transport: Transport, rows: UnitedRows, shares: tuple[HeadShare, ...]) -> HeadsBack:
        """See :meth:`HeadsThere.of`."""
        share, width = shares[transport.rank], Widths.of(problem, shares).back
        sent, received = (
            transport.arena.buffer(f"heads {end}", (transport.size, problem.rows, width), torch.uint8, problem.device)
            for end in ("sent", "received")
        )
        out, lse = _results(sent.flatten(0, 1), share, problem, shares)
        transfer = transport.prepare_all_to_all(received, sent)
        fill_missing = partial(_fill_results, out, lse)
        return cls(
            transfer=transfer._replace(fill_missing=fill_missing),
            out=out,
            lse=lse,
            back=rows.back,
            received=received,
            shares=shares,
            is_even=are_even(shares),
            moves=moves_for(problem.device),
        )

    def put(self, out: Tensor, lse: Tensor) -> None:
        """Fills the message with the results of all rows in the order of the batch: ``[R, heads, Dv]``, and fp32 ``[R, heads]``."""
        self.moves.gather_rows(self.out, out.flatten(1), self.back)
        self.moves.gather_rows(self.lse, lse, self.back)

    def take(self, out: Tensor, lse: Tensor, problem: Problem) -> None:
        """What has come, to ``[n, Hq, Dv]`` and ``[n, Hq]``."""
        if self.is_even:
            heads = self.shares[0].q_heads
            from_out, from_lse = _results(self.received, self.shares[0], problem, self.shares)
            _by_rank(out, heads).copy_(from_out.view(*from_lse.shape, problem.v_head_dim))
            _by_rank(lse, heads).copy_(from_lse)
            return
        for message, share in zip(self.received, self.shares, strict=True):
            from_out, from_lse = _results(message, share, problem, self.shares)
            out[:, share.q] = from_out.view(*from_lse.shape, problem.v_head_dim)
            lse[:, share.q] = from_lse


def _by_rank(x: Tensor, heads: int) -> Tensor:
    """``[rows, all heads, ...]`` as ``[w, rows, heads, ...]``."""
    return x.view(len(x), x.shape[1] // heads, heads, *x.shape[2:]).transpose(0, 1)


def _parts(message: Tensor, share: HeadShare, problem: Problem, widths: Widths) -> tuple[Tensor, Tensor]:
    """Of rows ``[..., width]`` the queries ``[..., heads, D]``, and K and V as of :mod:`cpattn.exchange.message`."""
    first, width = widths.q // problem.dtype.itemsize, problem.key_bytes // (problem.kv_heads * problem.dtype.itemsize)
    rows = message.shape[:-1]
    q = message[..., : share.q_heads * problem.head_dim].view(*rows, share.q_heads, problem.head_dim)
    return q, message[..., first : first + share.kv_heads * width].view(*rows, share.kv_heads, width)


def _results(message: Tensor, share: HeadShare, problem: Problem, shares: tuple[HeadShare, ...]) -> tuple[Tensor, Tensor]:
    """Of bytes ``[..., width]`` the outputs ``[..., heads * Dv]`` and the LSE ``[..., heads]``."""
    first = Widths.of(problem, shares).lse
    out = message[..., : share.q_heads * problem.v_head_dim * problem.dtype.itemsize].view(problem.dtype)
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
