"""Device code by which ranks of one host tell each other what lies in their memory, and what they have read of it.

Every rank has a heap that the others can read and write. It begins with words of 32 bits, and boards follow: places where the
rank posts a message, which the others then pull. For each board a rank counts its own posts. It writes that number, with the size of
the message beside it, into the word READY of every rank's heap once the message lies there, and that number into the word READ of
every rank's heap once it has read theirs. So nobody reads a message too early, and nobody writes over one that is still being read.
The counts are on the device, and so a CUDA graph replays all of it. They wrap around: what counts is their difference.

Whoever waits is one warp, as a rule in a kernel before the one that moves the message: what it finds is a word that all programs of
the next kernel read alike, and one multiprocessor waits instead of all, on which other groups may have something to do. A few programs of
a kernel may wait by themselves (:mod:`cpattn.kernels.peer_exchange`). A wait ends after a time that lies in memory, too. It then writes
into the word FAULT of every rank who did not come, and from there on no wait of the group waits any more. Where one stops, others come to
wait for those who wait for it: who has waited for half of the time says so in its word WAITING, a count of programs, and is blamed last.
Where programs wait by themselves some may find a fault that others have not met: each part is then right or NaN.

Flags are read by one thread each, of a program that has THREADS: where all of 32 warps look at one word, those who write it come late.

Suffixes: W ranks; F flags that are waited for; both padded to THREADS, or to a power of two.
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
_ALL_READ = tl.constexpr(peer_layout.ALL_READ)
_POSTS = tl.constexpr(peer_layout.POSTS)
_POSTED = tl.constexpr(peer_layout.POSTED)
_PULLED = tl.constexpr(peer_layout.PULLED)
_MAY_POST = tl.constexpr(peer_layout.MAY_POST)
_MAY_PULL = tl.constexpr(peer_layout.MAY_PULL)
_READY = tl.constexpr(peer_layout.READY)
_OTHER_MESSAGE = tl.constexpr(peer_layout.OTHER_MESSAGE)
# After so many looks at flags who waits looks at the clock and for a fault, too, which takes longer than a look.
_LOOKS = tl.constexpr(16)


@triton.jit
def _now():
    """Nanoseconds of a clock of this GPU."""
    return tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)


@triton.jit
def _flags(flags_F, is_waited_F):
    """Flags that others write; what comes next reads and writes after what they say. A fence would do the same, and wait for all that
    was written before as well."""
    return tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; mov.u64 $0, 0; @p ld.acquire.sys.global.u64 $0, [$1]; }",
        "=l,l,r", [flags_F, is_waited_F.to(tl.int32)], dtype=tl.int64, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def heap_of(table, rank):
    """A rank's heap, as words. Behind the ranks' the table has the address where the host reads of a fault."""
    return tl.load(table + rank).to(tl.pointer_type(tl.int32))


@triton.jit
def ready_flags(heap, board, rank, WORLD: tl.constexpr):
    """Which messages of ranks lie there; for a message of rank 0 on board 0 and all ranks and boards, those of every board in turn."""
    return (heap + _READY).to(tl.pointer_type(tl.int64)) + board * WORLD + rank


@triton.jit
def read_flags(heap, board, rank, WORLD: tl.constexpr):
    """The same: of this rank's messages those that ranks have read."""
    return ready_flags(heap, board, rank, WORLD) + BOARDS * WORLD


@triton.jit
def posts_of(heap, board):
    """How many messages this rank has posted on a board."""
    return tl.load(heap + _POSTS + board)


@triton.jit
def _looked_at(flags_F, posts_F, size, rank_F, is_waited_F):
    """How far flags are behind the numbers of posts, at most: negative, or 0; and 1 + a rank that has come so far with another size than
    this, or 0."""
    words_F = _flags(flags_F, is_waited_F)
    behind_F = tl.where(is_waited_F, (words_F >> 32).to(tl.int32) - posts_F, 0)
    has_other_F = is_waited_F & (behind_F >= 0) & (words_F.to(tl.int32) != size)
    return tl.minimum(tl.min(behind_F, 0), 0), tl.max(tl.where(has_other_F, 1 + rank_F, 0), 0)


@triton.jit
def _word(pointer, THREADS: tl.constexpr):
    """A word that others may change meanwhile, read by one thread: all threads of the program find the same."""
    thread_F = tl.arange(0, THREADS)
    return tl.sum(tl.load(pointer + thread_F * 0, mask=thread_F == 0, other=0, volatile=True), 0)


@triton.jit
def _tell_fault(table, fault, WORLD: tl.constexpr):
    """Writes down a fault for all ranks; the first one stays."""
    for rank in tl.static_range(WORLD):
        tl.atomic_cas(heap_of(table, rank) + _FAULT, 0, fault, sem="relaxed", scope="sys")


@triton.jit
def _any(found):
    """Whether any thread of the program has found so. What several warps find on a clock need not be the same, and where it decides what
    they do next they have to agree."""
    found = tl.inline_asm_elementwise(
        "{ .reg .pred p, q; setp.ne.s32 p, $1, 0; bar.red.or.pred q, 0, p; selp.s32 $0, 1, 0, q; }",
        "=r,r", [found.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    return found != 0


@triton.jit
def _to_blame(table, flags_F, posts_F, rank_F, is_waited_F):
    """1 + a rank that is behind, one that does not wait itself if there is one; 0 where none is."""
    is_behind_F = is_waited_F & ((_flags(flags_F, is_waited_F) >> 32).to(tl.int32) - posts_F < 0)
    heap_F = tl.load(table + rank_F, mask=is_behind_F, other=0).to(tl.pointer_type(tl.int32))
    waiting_F = tl.load(heap_F + _WAITING, mask=is_behind_F, other=0, volatile=True)
    idle = tl.max(tl.where(is_behind_F & (waiting_F == 0), 1 + rank_F, 0), 0)
    return tl.where(idle > 0, idle, tl.max(tl.where(is_behind_F, 1 + rank_F, 0), 0))


@triton.jit
def _await(table, heap, flags_F, posts_F, size, rank_F, is_waited_F, WORLD: tl.constexpr, THREADS: tl.constexpr):
    """Waits until each flag has come to the number of a post, the time is over, or the group has a fault; each flag is a rank's. Whether
    all have come, and 1 + a rank whose flag has another size, or 0."""
    # The loop carries no tensor: Triton 3.6 cannot compile one that does. What it carries is alike for all threads of the program.
    behind, other = _looked_at(flags_F, posts_F, size, rank_F, is_waited_F)
    fault = 0
    looks = 0
    has_said = 0
    begin = tl.cast(0, tl.int64)
    while (behind < 0) & (fault == 0):
        looks += 1
        if looks % _LOOKS == 0:
            # Both words in one.
            state = _word((heap + _FAULT).to(tl.pointer_type(tl.int64)), THREADS)
            fault = state.to(tl.int32)
            limit = (state >> 32) * 1000000
            now = _now()
            begin = tl.where(begin == 0, now, begin)
            is_long = _any((fault == 0) & (now - begin > limit // 2))
            if is_long & (has_said == 0):
                has_said = 1
                tl.atomic_add(heap + _WAITING, 1, sem="relaxed", scope="sys")
            if is_long & _any(now - begin > limit):
                fault = _to_blame(table, flags_F, posts_F, rank_F, is_waited_F)
                _tell_fault(table, fault, WORLD)
        behind, other = _looked_at(flags_F, posts_F, size, rank_F, is_waited_F)
    if has_said != 0:
        tl.atomic_add(heap + _WAITING, -1, sem="relaxed", scope="sys")
    return behind == 0, other


@triton.jit
def found_no_fault(table, heap, WORLD: tl.constexpr, THREADS: tl.constexpr):
    """Whether there is none; the host is told of one."""
    fault = _word(heap + _FAULT, THREADS)
    if fault != 0:
        tl.store(tl.load(table + WORLD).to(tl.pointer_type(tl.int32)), fault)
    return fault == 0


@triton.jit
def await_readers(table, heap, board, FIRST: tl.constexpr, WORLD: tl.constexpr, FLAGS: tl.constexpr, THREADS: tl.constexpr):
    """Waits until all have read what this rank has posted before: on this board, or, with FIRST, on all of them, as boards lie
    elsewhere in another call. Whether they have.

    Args:
        FLAGS: a power of two, THREADS at least; with FIRST as many as there are boards and ranks at least.
    """
    flag_F = tl.arange(0, FLAGS)
    board_F = flag_F // WORLD if FIRST else board + flag_F * 0
    is_waited_F = flag_F < (BOARDS * WORLD if FIRST else WORLD)
    posts_F = tl.load(heap + _POSTS + board_F, mask=is_waited_F, other=0)
    reader_F = flag_F % WORLD
    flags_F = read_flags(heap, board_F, reader_F, WORLD)
    are_read, _ = _await(table, heap, flags_F, posts_F, 0, reader_F, is_waited_F, WORLD, THREADS)
    return are_read


@triton.jit
def await_messages(table, heap, board, posts, size, first, many, WORLD: tl.constexpr, THREADS: tl.constexpr):
    """Waits for the messages of ``many`` ranks from ``first`` on, around the ring, the ``posts``-th on this board. One of another size or
    form than this rank's is a fault: its rank makes another call. Whether the messages lie there. Who posts the ``posts``-th itself in this
    launch has found no fault then. Any other has to look: after a fault nobody posts or counts any more, and older messages lie there."""
    rank_W = tl.arange(0, THREADS)
    is_waited_W = (rank_W < WORLD) & ((rank_W - first + WORLD) % WORLD < many)
    flags_W = ready_flags(heap, board, rank_W, WORLD)
    have_come, other = _await(table, heap, flags_W, posts + rank_W * 0, size, rank_W, is_waited_W, WORLD, THREADS)
    if have_come & (other > 0):
        _tell_fault(table, other + (_OTHER_MESSAGE - 1), WORLD)
    are_there = have_come & (other == 0)
    if are_there == 0:
        found_no_fault(table, heap, WORLD, THREADS)
    return are_there


@triton.jit
def let_post(heap, board, may):
    """Writes down for the next kernel whether this rank may post."""
    tl.store(heap + _MAY_POST + board, may.to(tl.int32))


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
def is_all_read(heap):
    """Whether this rank has waited until all had read all that it has posted. Nobody writes it beside a kernel that posts."""
    return tl.load(heap + _ALL_READ) != 0


@triton.jit
def await_all_read(table, heap, board, posts, WORLD: tl.constexpr, THREADS: tl.constexpr):
    """Waits until all have read this rank's last message, the ``posts``-th, one program of all, and writes that down."""
    reader_W = tl.arange(0, THREADS)
    flags_W = read_flags(heap, board, reader_W, WORLD)
    are_read, _ = _await(table, heap, flags_W, posts + reader_W * 0, 0, reader_W, reader_W < WORLD, WORLD, THREADS)
    tl.store(heap + _ALL_READ, are_read.to(tl.int32))


@triton.jit
def _is_last(counter, programs):
    """Whether this is the last of so many programs to come here; all that the others have written is seen by it."""
    # All threads of this program have written before one of them counts.
    tl.debug_barrier()
    is_last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == programs - 1
    if is_last:
        tl.store(counter, 0)
    return is_last


@triton.jit
def _tell(table, flag, word, WORLD: tl.constexpr, THREADS: tl.constexpr):
    """Writes a flag into every rank's heap, after all that was written before; ``flag`` is where it lies behind the heap's begin, in flags.
    All at once: between two of them one would wait until another rank's memory has answered."""
    rank_W = tl.arange(0, THREADS)
    heap_W = tl.load(table + rank_W, mask=rank_W < WORLD, other=0).to(tl.pointer_type(tl.int64))
    tl.atomic_xchg(heap_W + flag, word + rank_W * 0, mask=rank_W < WORLD, sem="release", scope="sys")


@triton.jit
def is_last_to_post(heap, board):
    """Whether this is the last program of a post."""
    return _is_last(heap + _POSTED + board, tl.num_programs(0))


@triton.jit
def tell_posted(table, heap, rank, board, size, WORLD: tl.constexpr, THREADS: tl.constexpr):
    """Tells all ranks that the message lies there, and of which size it is, where the group has no fault: what another program of this
    post has found is found here, too."""
    tl.store(heap + _ALL_READ, 0)
    if found_no_fault(table, heap, WORLD, THREADS):
        posts = posts_of(heap, board) + 1
        tl.store(heap + _POSTS + board, posts)
        _tell(table, _READY // 2 + board * WORLD + rank, (posts.to(tl.int64) << 32) | size, WORLD, THREADS)


@triton.jit
def end_post(table, heap, rank, board, size, WORLD: tl.constexpr, THREADS: tl.constexpr):
    """Has the last program tell all ranks that the message lies there."""
    if is_last_to_post(heap, board):
        tell_posted(table, heap, rank, board, size, WORLD, THREADS)


@triton.jit
def is_last_to_pull(heap, board, programs):
    """Whether this is the last one of so many programs to have read what it reads."""
    return _is_last(heap + _PULLED + board, programs)


@triton.jit
def tell_read(table, rank, board, posts, WORLD: tl.constexpr, THREADS: tl.constexpr):
    """Tells all ranks that their messages have been read, the ``posts``-th ones."""
    _tell(table, _READY // 2 + (BOARDS + board) * WORLD + rank, posts.to(tl.int64) << 32, WORLD, THREADS)


@triton.jit
def end_pull(table, heap, rank, board, WORLD: tl.constexpr, THREADS: tl.constexpr):
    """Has the last program tell all ranks that their messages have been read."""
    is_last = is_last_to_pull(heap, board, tl.num_programs(0))
    # What was read may be the NaN of a rank that has found one.
    found_no_fault(table, heap, WORLD, THREADS)
    if is_last:
        tell_read(table, rank, board, posts_of(heap, board), WORLD, THREADS)
