"""A Triton kernel by which each rank puts its rows in order where the others read them, and brings theirs, in one launch;
:mod:`cpattn.moves.peer_exchange` launches it.

All programs post, and then a few of them wait and pull. The attention is launched as a dependent. So that it can begin, and what other
groups do, which those who are waited for may need, most multiprocessors stay free of them; or, for a short message, they are small, and
leave room for the attention on each. All of a rank's programs have begun once its message lies there. So where all messages lie there the
kernels of all ranks are certain to end.

That nobody reads any more what a post writes over is known before it as a rule: the kernel of the last call has waited for that at its
end, one program beside the attention. After a call that sends otherwise the few wait, and post everything, while the others leave. So
they do after one that posts and pulls in two launches, as all ranks do then: in the second no program may wait for other ranks' second
ones, which may find no multiprocessor free.

Suffixes: R rows, or pairs of a row and a head; D a padded head dim; W words; T pieces that are brought at once.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl

from cpattn.kernels.arrivals import all_flag, announce, fence_for_copies, let_next_begin, piece_flag
from cpattn.kernels.peer_flags import (
    await_all_read,
    await_messages,
    await_readers,
    found_no_fault,
    heap_of,
    is_all_read,
    is_last_to_post,
    is_last_to_pull,
    posts_of,
    tell_posted,
    tell_read,
)
from cpattn.kernels.peer_rows import at


@triton.jit
def _rows_of(order, source, i, num_pieces, PIECE: tl.constexpr, TOGETHER: tl.constexpr):
    """The rows of TOGETHER pieces from the ``i``-th to be brought on, and which of all ranks' rows come to them; -1 for none."""
    row_R = tl.arange(0, PIECE * TOGETHER)
    place_R = i + row_R // PIECE
    piece_R = tl.load(order + place_R, mask=place_R < num_pieces, other=-1)
    to_R = piece_R * PIECE + row_R % PIECE
    return to_R, tl.load(source + to_R, mask=piece_R >= 0, other=-1)


@triton.jit(do_not_specialize=["rank", "board", "offset", "size", "num_rows", "few"])
def exchange_rows_kernel(
    table, k, v, like, own_rows, places, source, order, flags, rank, board, offset, size, num_rows, few,
    k_stride_row, k_stride_head, v_stride_row, v_stride_head,
    HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D_PADDED: tl.constexpr, DV_PADDED: tl.constexpr, BLOCK_R: tl.constexpr,
    WIDTH: tl.constexpr, UNIT: tl.constexpr, PIECE: tl.constexpr, BLOCK_W: tl.constexpr, TOGETHER: tl.constexpr, POSTS: tl.constexpr,
    PULLS: tl.constexpr, SHARES: tl.constexpr, WORLD: tl.constexpr, FLAGS: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """Own rows and pieces of others' in this rank's message ``[num_rows, HEADS, D + DV]``, whose rows are of WIDTH words too; ``like`` is
    of the words that are pulled.

    With POSTS those rows of K and V go there that stand in ``own_rows`` after how many they are: the i-th to row ``places[i]``. DV is 0
    where V is in K. Then a new round of arrivals begins.

    With PULLS the first ``few`` programs, of at least as many, bring pieces of PIECE rows, as many as ``order`` begins with, in the order
    that follows: row i is row ``source[i]`` of all ranks' messages, rank after rank; none for -1. A program brings TOGETHER pieces at once,
    BLOCK_W columns after BLOCK_W columns, so that enough bytes are on their way. Then it announces them, to a kernel that runs beside this
    one: that begins when all programs of this one know that the messages lie there, and so are certain to end.

    One launch may post and the next one pull: where other rows of the message are written between, and where ranks share a stream
    (SHARES). Those would otherwise keep away whom they wait for. Their hosts wait, and no kernel does.
    """
    heap = heap_of(table, rank)
    # Both are counted on by the last program of a post, after all have read them.
    posts = posts_of(heap, board)
    turn = tl.load(flags)
    if POSTS:
        posts += 1
        turn += 1
        can_write = is_all_read(heap)
        num_own = tl.load(own_rows)
        posting = tl.where(can_write, tl.num_programs(0), few)
        if (can_write == 0) & (tl.program_id(0) < few):
            can_write = await_readers(table, heap, board, True, WORLD, FLAGS, THREADS)
        message = at(table, rank, offset, k)
        column_1D = tl.arange(0, D_PADDED)[None, :]
        column_1DV = tl.arange(0, DV_PADDED)[None, :]
        for first in range(tl.program_id(0) * BLOCK_R, tl.where(can_write, num_own, 0) * HEADS, posting * BLOCK_R):
            pair_R = (first + tl.arange(0, BLOCK_R)).to(tl.int64)
            head_R = pair_R % HEADS
            is_put_R = pair_R < num_own * HEADS
            row_R = tl.load(own_rows + 1 + pair_R // HEADS, mask=is_put_R, other=0).to(tl.int64)
            place_R = tl.load(places + pair_R // HEADS, mask=is_put_R, other=0).to(tl.int64)
            is_put_R1 = is_put_R[:, None]
            from_R = k + (row_R * k_stride_row + head_R * k_stride_head)
            k_RD = tl.load(from_R[:, None] + column_1D, mask=is_put_R1 & (column_1D < D), other=0)
            to_R = message + (place_R * HEADS + head_R) * (D + DV)
            if DV:
                # Both are on their way before either is written.
                from_R = v + (row_R * v_stride_row + head_R * v_stride_head)
                v_RD = tl.load(from_R[:, None] + column_1DV, mask=is_put_R1 & (column_1DV < DV), other=0)
                tl.store((to_R + D)[:, None] + column_1DV, v_RD, mask=is_put_R1 & (column_1DV < DV))
            tl.store(to_R[:, None] + column_1D, k_RD, mask=is_put_R1 & (column_1D < D))
        # The attention reads them by copies while this kernel runs.
        fence_for_copies()
        if is_last_to_post(heap, board):
            tl.store(flags, turn)
            tell_posted(table, heap, rank, board, size, WORLD, THREADS)
    if PULLS and tl.program_id(0) < few:
        # What says where pieces lie comes while others' messages are waited for.
        num_pieces = tl.load(order)
        order += 1
        first = tl.program_id(0) * TOGETHER
        to_row_R, from_row_R = _rows_of(order, source, first, num_pieces, PIECE, TOGETHER)
        is_there = await_messages(table, heap, board, posts, size, 0, WORLD, WORLD, THREADS)
        if not POSTS:
            is_there = is_there & found_no_fault(table, heap, WORLD, THREADS)
        PARTS: tl.constexpr = (WIDTH + BLOCK_W - 1) // BLOCK_W
        out = at(table, rank, offset, like)
        row_units = WIDTH // UNIT
        if is_there:
            let_next_begin()
        else:
            # What this rank has itself as well, before anybody reads it: the next kernel begins after this one. All bits set are NaN in
            # every floating dtype.
            for row in range(tl.program_id(0), num_rows, few):
                for part in tl.static_range(PARTS):
                    word_W = part * BLOCK_W + tl.arange(0, BLOCK_W)
                    to_W = out + (tl.cast(row, tl.int64) * row_units) * UNIT + word_W
                    tl.store(to_W, tl.full([BLOCK_W], -1, like.dtype.element_ty), mask=word_W < WIDTH)
        for i in range(first, num_pieces, few * TOGETHER):
            # The numbers by which the next ones are found are on their way meanwhile.
            next_to_row_R, next_from_row_R = _rows_of(order, source, i + few * TOGETHER, num_pieces, PIECE, TOGETHER)
            is_row_R1 = (from_row_R >= 0)[:, None]
            from_row_R = tl.maximum(from_row_R, 0)
            from_R = at(table, from_row_R // num_rows, offset, out) + ((from_row_R % num_rows).to(tl.int64) * row_units) * UNIT
            to_R = out + (to_row_R.to(tl.int64) * row_units) * UNIT
            for part in tl.static_range(PARTS):
                word_1W = part * BLOCK_W + tl.arange(0, BLOCK_W)[None, :]
                is_put_RW = is_row_R1 & (word_1W < WIDTH)
                values_RW = tl.load(from_R[:, None] + word_1W, mask=is_put_RW, other=0, cache_modifier=".cg")
                tl.store(to_R[:, None] + word_1W, tl.where(is_there, values_RW, -1), mask=is_put_RW)
            piece_T = i + tl.arange(0, TOGETHER)
            is_piece_T = piece_T < num_pieces
            announce(piece_flag(flags, tl.load(order + piece_T, mask=is_piece_T, other=0)), turn, is_piece_T)
            to_row_R = next_to_row_R
            from_row_R = next_from_row_R
        is_last = is_last_to_pull(heap, board, few)
        announce(all_flag(flags), turn, is_last)
        # What was read may be the NaN of a rank that has found one.
        found_no_fault(table, heap, WORLD, THREADS)
        if is_last:
            tell_read(table, rank, board, posts, WORLD, THREADS)
            if POSTS and not SHARES:
                await_all_read(table, heap, board, posts, WORLD, THREADS)
