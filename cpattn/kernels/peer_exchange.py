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

Suffixes: R rows, or pairs of a row and a head; D a padded head dim; W words; T pieces that are brought together.
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

# Heaps whose addresses are kept in registers. Small programs have 32 a thread: with 16 heaps they wrote 190 to memory.
_HELD_HEAPS = tl.constexpr(8)


@triton.jit
def _messages_of(messages, table, rank_R, offset, like, WORLD: tl.constexpr):
    """As :func:`at`, of a rank for each row. ``messages`` are those of all ranks, unless there are more than registers hold: then the load
    of a row waits for another one, of an address."""
    if WORLD > _HELD_HEAPS:
        message_R = at(table, rank_R, offset, like)
    else:
        message_R = messages[0] + tl.zeros_like(rank_R)
        for rank in tl.static_range(1, WORLD):
            message_R = tl.where(rank_R == rank, messages[rank], message_R)
        message_R = tl.multiple_of(message_R, 16)
    return message_R


@triton.jit(do_not_specialize=["rank", "board", "offset", "size", "num_rows", "few"])
def exchange_rows_kernel(
    table, k, v, like, own_rows, places, source, order, flags, rank, board, offset, size, num_rows, few,
    k_stride_row, k_stride_head, v_stride_row, v_stride_head,
    HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D_PADDED: tl.constexpr, DV_PADDED: tl.constexpr, BLOCK_R: tl.constexpr,
    WIDTH: tl.constexpr, UNIT: tl.constexpr, PIECE: tl.constexpr, TOGETHER: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_W: tl.constexpr,
    STAGES: tl.constexpr, POSTS: tl.constexpr, PULLS: tl.constexpr, SHARES: tl.constexpr, WORLD: tl.constexpr, FLAGS: tl.constexpr,
    THREADS: tl.constexpr,
):  # fmt: skip
    """Own rows and pieces of others' in this rank's message ``[num_rows, HEADS, D + DV]``, whose rows are of WIDTH words too; ``like`` is
    of the words that are pulled.

    With POSTS those rows of K and V go there that stand in ``own_rows`` after how many they are: the i-th to row ``places[i]``. DV is 0
    where V is in K. Then a new round of arrivals begins.

    With PULLS the first ``few`` programs, of at least as many, bring pieces of PIECE rows, as many as ``order`` begins with, in the order
    that follows. Of the i-th of them row j is row ``source[PIECE * i + j]`` of all ranks' messages, rank after rank; none for -1. A program
    brings COLUMNS of TOGETHER pieces at a time, and takes BLOCK_W columns at once through its registers. From 2 STAGES on they come by way
    of shared memory, where those of the next STAGES - 2 times are on their way meanwhile. Then it announces them, to a kernel that runs
    beside this one: that begins when all programs of this one know that the messages lie there, and so are certain to end.

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
        num_pieces = tl.load(order)
        order += 1
        messages = (at(table, 0, offset, like),)
        # Of no other one where they are looked up.
        for other in tl.static_range(1, WORLD if WORLD <= _HELD_HEAPS else 1):
            # Triton has no starred expressions.
            messages = messages + (at(table, other, offset, like),)  # type: ignore[assignment]  # noqa: RUF005
        is_there = await_messages(table, heap, board, posts, size, 0, WORLD, WORLD, THREADS)
        if not POSTS:
            is_there = is_there & found_no_fault(table, heap, WORLD, THREADS)
        TIMES: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
        out = at(table, rank, offset, like)
        row_units = WIDTH // UNIT
        if is_there:
            let_next_begin()
        else:
            # What this rank has itself as well, before anybody reads it: the next kernel begins after this one. All bits set are NaN in
            # every floating dtype.
            for row in range(tl.program_id(0), num_rows, few):
                for begin in range(0, WIDTH, BLOCK_W):
                    word_W = begin + tl.arange(0, BLOCK_W)
                    to_W = out + (tl.cast(row, tl.int64) * row_units) * UNIT + word_W
                    tl.store(to_W, tl.full([BLOCK_W], -1, like.dtype.element_ty), mask=word_W < WIDTH)
        row_R = tl.arange(0, PIECE * TOGETHER)
        piece_T = tl.arange(0, TOGETHER)
        groups = (num_pieces + TOGETHER - 1) // TOGETHER
        for time in tl.range(0, (groups - tl.program_id(0) + few - 1) // few * TIMES, num_stages=STAGES):
            i = (tl.program_id(0) + time // TIMES * few) * TOGETHER
            is_piece_R = i + row_R // PIECE < num_pieces
            from_row_R = tl.load(source + i * PIECE + row_R, mask=is_piece_R, other=-1)
            to_row_R = tl.load(order + i + row_R // PIECE, mask=is_piece_R, other=0) * PIECE + row_R % PIECE
            is_row_R1 = (from_row_R >= 0)[:, None]
            from_row_R = tl.maximum(from_row_R, 0)
            from_R = _messages_of(messages, table, from_row_R // num_rows, offset, like, WORLD)
            from_R += ((from_row_R % num_rows).to(tl.int64) * row_units) * UNIT
            to_R = out + (to_row_R.to(tl.int64) * row_units) * UNIT
            for begin in tl.static_range(0, COLUMNS, BLOCK_W):
                word_1W = time % TIMES * COLUMNS + begin + tl.arange(0, BLOCK_W)[None, :]
                is_put_RW = is_row_R1 & (word_1W < WIDTH)
                values_RW = tl.load(from_R[:, None] + word_1W, mask=is_put_RW, other=0, cache_modifier=".cg")
                tl.store(to_R[:, None] + word_1W, tl.where(is_there, values_RW, -1), mask=is_put_RW)
            is_piece_T = (i + piece_T < num_pieces) & (time % TIMES == TIMES - 1)
            announce(piece_flag(flags, tl.load(order + i + piece_T, mask=is_piece_T, other=0)), turn, is_piece_T)
        is_last = is_last_to_pull(heap, board, few)
        announce(all_flag(flags), turn, is_last)
        # What was read may be the NaN of a rank that has found one.
        found_no_fault(table, heap, WORLD, THREADS)
        if is_last:
            tell_read(table, rank, board, posts, WORLD, THREADS)
            if POSTS and not SHARES:
                await_all_read(table, heap, board, posts, WORLD, THREADS)
