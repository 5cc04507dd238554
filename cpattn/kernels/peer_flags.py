"""Device code by which ranks of one host tell each other what lies in their memory, and what they have read of it.

Every rank has a heap that the others can read and write. It begins with words of 32 bits, and boards follow: places where the
rank posts a message, which the others then pull. For each board a rank counts its own posts. It writes that number into the
word READY of every other rank's heap once the message lies there, with its SIZE before, and into the word READ of every other
rank's heap once it has read theirs. So nobody reads a message too early, and nobody writes over one that is still being read.
The counts are on the device, and so a CUDA graph replays all of it. They wrap around: what counts is their difference.

Whoever waits is one warp, as a rule in a kernel before the one that moves the message: what it finds is a word that all programs of
the next kernel read alike, and one multiprocessor waits instead of all, on which other groups may have something to do. A kernel of few
programs may wait by itself. A wait ends after a time that lies in memory, too. It then writes into the word FAULT of every rank who did
not come, and from there on no wait of the group waits any more. Where one stops, others come to wait for those who wait for it: who has
waited for half of the time says so in its word WAITING, a count of programs, and is blamed last. Where programs wait by themselves some
may find a fault that others have not met: each part is then right or NaN.

Suffixes: W ranks, padded to a power of two; F flags that are waited for.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl

from cpattn.kernels import peer_layout

BOARDS = tl.constexpr(peer_layout.BOARDS)
_FAULT = tl.constexpr(peer_layout.FAULT)
_LIMIT = tl.constexpr(peer_layout.LIMIT)
_WAITING = tl.constexpr(peer_layout.WAITING)
_POSTS = tl.constexpr(peer_layout.POSTS)
_POSTED = tl.constexpr(peer_layout.POSTED)
_PULLED = tl.constexpr(peer_layout.PULLED)
_MAY_POST = tl.constexpr(peer_layout.MAY_POST)
_MAY_PULL = tl.constexpr(peer_layout.MAY_PULL)
_READY = tl.constexpr(peer_layout.READY)
_OTHER_MESSAGE = tl.constexpr(peer_layout.OTHER_MESSAGE)


@triton.jit
def _now():
    """Nanoseconds of a clock of this GPU."""
    return tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)


@triton.jit
def _flags(flags_F, is_waited_F):
    """Flags that others write; what comes next reads and writes after what they say. A fence would do the same, and wait for all that
    was written before as well."""
    return tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; mov.u32 $0, 0; @p ld.acquire.sys.global.u32 $0, [$1]; }",
        "=r,l,r", [flags_F, is_waited_F.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def heap_of(table, rank):
    """A rank's heap, as words. Behind the ranks' the table has the address where the host reads of a fault."""
    return tl.load(table + rank).to(tl.pointer_type(tl.int32))


@triton.jit
def _behind(flags_F, wants_F, is_waited_F):
    """How far each flag is behind what is wanted: negative, or 0 and more."""
    return tl.where(is_waited_F, _flags(flags_F, is_waited_F) - wants_F, 0)


@triton.jit
def _tell_fault(table, fault, WORLD: tl.constexpr):
    """Writes down a fault for all ranks; the first one stays."""
    for rank in tl.static_range(WORLD):
        tl.atomic_cas(heap_of(table, rank) + _FAULT, 0, fault, sem="relaxed", scope="sys")


@triton.jit
def _any(found):
    """Whether any thread of the program has found so. What several warps read of memory that changes need not be the same, and where
    it decides what they do next they have to agree."""
    found = tl.inline_asm_elementwise(
        "{ .reg .pred p, q; setp.ne.s32 p, $1, 0; bar.red.or.pred q, 0, p; selp.s32 $0, 1, 0, q; }",
        "=r,r", [found.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    return found != 0


@triton.jit
def _to_blame(table, rank_F, is_behind_F):
    """1 + a rank that is behind, one that does not wait itself if there is one; 0 where none is."""
    heap_F = tl.load(table + rank_F, mask=is_behind_F, other=0).to(tl.pointer_type(tl.int32))
    waiting_F = tl.load(heap_F + _WAITING, mask=is_behind_F, other=0, volatile=True)
    idle = tl.max(tl.where(is_behind_F & (waiting_F == 0), 1 + rank_F, 0), 0)
    return tl.where(idle > 0, idle, tl.max(tl.where(is_behind_F, 1 + rank_F, 0), 0))


@triton.jit
def _await(table, heap, flags_F, wants_F, rank_F, is_waited_F, WORLD: tl.constexpr):
    """Waits until each flag has come to what is wanted, the time is over, or the group has a fault; each flag is a rank's."""
    # The loop carries no tensor: Triton 3.6 cannot compile one that does.
    behind = tl.min(_behind(flags_F, wants_F, is_waited_F), 0)
    fault = tl.load(heap + _FAULT, volatile=True)
    # Alike for all threads of the program, as what it depends on is.
    has_said = 0
    begin = _now()
    while _any((behind < 0) & (fault == 0)):
        behind_F = _behind(flags_F, wants_F, is_waited_F)
        behind = tl.min(behind_F, 0)
        fault = tl.load(heap + _FAULT, volatile=True)
        limit = tl.load(heap + _LIMIT, volatile=True).to(tl.int64) * 1000000
        waited = _now() - begin
        is_long = _any((behind < 0) & (fault == 0) & (2 * waited > limit))
        if is_long & (has_said == 0):
            has_said = 1
            tl.atomic_add(heap + _WAITING, 1, sem="relaxed", scope="sys")
        if _any((behind < 0) & (fault == 0) & (waited > limit)):
            fault = _to_blame(table, rank_F, behind_F < 0)
            _tell_fault(table, fault, WORLD)
    if has_said != 0:
        tl.atomic_add(heap + _WAITING, -1, sem="relaxed", scope="sys")


@triton.jit
def _found_no_fault(table, heap, WORLD: tl.constexpr):
    """Whether there is none, after a wait; the host is told of one."""
    has_fault = _any(tl.load(heap + _FAULT, volatile=True) != 0)
    if has_fault:
        tl.store(tl.load(table + WORLD).to(tl.pointer_type(tl.int32)), tl.load(heap + _FAULT, volatile=True))
    return has_fault == 0


@triton.jit
def await_readers(table, rank, board, FIRST: tl.constexpr, WORLD: tl.constexpr, WORLD_PADDED: tl.constexpr):
    """Waits until all have read what this rank has posted before: on this board, or, as a call begins, on all of them, since
    boards lie elsewhere in another call. Writes down for the next kernel whether this rank may post."""
    heap = heap_of(table, rank)
    if FIRST:
        flag_F = tl.arange(0, BOARDS * WORLD_PADDED)
        board_F = flag_F // WORLD_PADDED
    else:
        flag_F = tl.arange(0, WORLD_PADDED)
        board_F = board + flag_F * 0
    reader_F = flag_F % WORLD_PADDED
    read_F = heap + _READY + BOARDS * WORLD + board_F * WORLD + reader_F
    posts_F = tl.load(heap + _POSTS + board_F)
    _await(table, heap, read_F, posts_F, reader_F, reader_F < WORLD, WORLD)
    tl.store(heap + _MAY_POST + board, _found_no_fault(table, heap, WORLD).to(tl.int32))


@triton.jit
def await_messages(table, rank, board, size, first, many, WORLD: tl.constexpr, WORLD_PADDED: tl.constexpr):
    """Waits for the messages of ``many`` ranks from ``first`` on, around the ring. One of another size or form than this rank's is a
    fault: its rank makes another call. This rank's heap, and whether the messages lie there."""
    heap = heap_of(table, rank)
    rank_W = tl.arange(0, WORLD_PADDED)
    posts = tl.load(heap + _POSTS + board)
    is_waited_W = (rank_W < WORLD) & ((rank_W - first + WORLD) % WORLD < many)
    flags_W = heap + _READY + board * WORLD + rank_W
    _await(table, heap, flags_W, posts + rank_W * 0, rank_W, is_waited_W, WORLD)
    sizes_W = tl.load(flags_W + 2 * BOARDS * WORLD, mask=is_waited_W, other=size, volatile=True)
    other = tl.max(tl.where(sizes_W != size, 1 + rank_W, 0), 0)
    if _any((other > 0) & (tl.load(heap + _FAULT, volatile=True) == 0)):
        _tell_fault(table, tl.where(other > 0, other + (_OTHER_MESSAGE - 1), 0), WORLD)
    return heap, _found_no_fault(table, heap, WORLD)


@triton.jit
def let_pull(heap, board, is_there):
    """Writes down for the next kernel whether the messages lie there."""
    tl.store(heap + _MAY_PULL + board, is_there.to(tl.int32))


@triton.jit
def may_post(table, rank, board):
    """This rank's heap, and whether the wait before found that it may be written."""
    heap = heap_of(table, rank)
    return heap, tl.load(heap + _MAY_POST + board) != 0


@triton.jit
def may_pull(table, rank, board):
    """This rank's heap, and whether the wait before found that the messages lie there."""
    heap = heap_of(table, rank)
    return heap, tl.load(heap + _MAY_PULL + board) != 0


@triton.jit
def _is_last(counter):
    """Whether this is the last program of its launch to come here; all that the others have written is seen by it."""
    # All threads of this program have written before one of them counts.
    tl.debug_barrier()
    is_last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1
    if is_last:
        tl.store(counter, 0)
    return is_last


@triton.jit
def end_post(table, heap, rank, board, size, is_written, WORLD: tl.constexpr):
    """Has the last program tell all ranks that the message lies there, and of which size it is."""
    is_last = _is_last(heap + _POSTED + board)
    if is_last & is_written:
        posts = tl.load(heap + _POSTS + board) + 1
        tl.store(heap + _POSTS + board, posts)
        for reader in tl.static_range(WORLD):
            ready = heap_of(table, reader) + _READY + board * WORLD + rank
            tl.atomic_xchg(ready + 2 * BOARDS * WORLD, size, sem="relaxed", scope="sys")
            tl.atomic_xchg(ready, posts, sem="release", scope="sys")


@triton.jit
def end_pull(table, heap, rank, board, WORLD: tl.constexpr):
    """Has the last program tell all ranks that their messages have been read; whether this is it."""
    is_last = _is_last(heap + _PULLED + board)
    # What was read may be the NaN of a rank that has found one.
    _found_no_fault(table, heap, WORLD)
    if is_last:
        posts = tl.load(heap + _POSTS + board)
        for writer in tl.static_range(WORLD):
            read = heap_of(table, writer) + _READY + BOARDS * WORLD + board * WORLD + rank
            tl.atomic_xchg(read, posts, sem="release", scope="sys")
    return is_last
