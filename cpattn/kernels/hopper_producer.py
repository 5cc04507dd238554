"""Device code for Hopper: the warp that draws items from the queue, and brings their queries and key blocks.

Suffixes: none of its values is a matrix but those it clears.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from cpattn.kernels.arrival_layout import PIECE_ROWS
from cpattn.kernels.arrivals import piece_flag
from cpattn.kernels.hopper_channels import put_item, wait_empty
from cpattn.kernels.hopper_items import PART_DIMS, Brought, Item, bring_queries, parts_of, tma_load
from cpattn.kernels.hopper_stored import Waiting, bring_stored, finish_stored, nothing_yet
from cpattn.kernels.tile_keys import (
    PageLine,
    find_in_run,
    keys_seen,
    last_block,
    load_page_line,
    load_request,
    load_run,
    load_tile,
    page_entry,
)

_PIECE_ROWS = gl.constexpr(PIECE_ROWS)
# Pairs of pieces that a warp looks at, each thread at one.
_PAIRS = gl.constexpr(31)
# Before any row.
_NO_ROW = gl.constexpr(2**31 - 1)
# Keys of a part of a key block, by which keys outside of the range are cleared.
_PART_KEYS = gl.constexpr(16)


@gluon.jit
def _find(item, key, C: gl.constexpr):
    """The page of the keys ``key .. key + C.PAGE_KEYS - 1`` and where in it they begin; instead of keys outside of the range,
    whose entries may be anything, those of the nearest inside."""
    KEYS: gl.constexpr = C.PAGE_KEYS
    PAGE_SIZE: gl.constexpr = C.PAGE_SIZE
    key = gl.maximum(gl.minimum(key, item.keys.end - 1), item.keys.first) // KEYS * KEYS
    return gl.load(page_entry(item.line, key, PAGE_SIZE)), key % PAGE_SIZE


@gluon.jit
def _load_pages(source, item, block, stage, smem, full, PADDED: gl.constexpr, C: gl.constexpr):
    """Brings a key block in parts of C.PAGE_KEYS keys, which lie in one page each."""
    KEYS: gl.constexpr = C.PAGE_KEYS
    STAGES: gl.constexpr = C.STAGES
    DOWN: gl.constexpr = C.BLOCK_N // KEYS
    ACROSS: gl.constexpr = PADDED // PART_DIMS
    parts = parts_of(smem, STAGES * DOWN * ACROSS, KEYS, True)
    for down in range(DOWN):
        page, in_page = _find(item, block + down * KEYS, C)
        for across in gl.static_range(ACROSS):
            part = parts.index((stage * ACROSS + across) * DOWN + down)
            tma_load(source, [page.to(gl.int32), item.kv_head, in_page, across * PART_DIMS], full, part)


@gluon.jit
def _load_block(source, prefix, own, item, block, stage, smem, full, PADDED: gl.constexpr, C: gl.constexpr):
    """Brings a block of K or of V into a stage; once it is there, ``full`` says so."""
    BYTES: gl.constexpr = C.BLOCK_N * PADDED * smem.dtype.primitive_bitwidth // 8
    mbarrier.expect(full, BYTES)
    if C.OWN:
        if block >= item.own_begin:
            tma_load(own, [item.kv_head, item.own_start + block, 0], full, smem.index(stage))
        else:
            _load_others(source, prefix, item, block, stage, smem, full, PADDED, C)
    else:
        _load_others(source, prefix, item, block, stage, smem, full, PADDED, C)


@gluon.jit
def _load_others(source, prefix, item, block, stage, smem, full, PADDED: gl.constexpr, C: gl.constexpr):
    """The same of a block that is not in a rank's own rows."""
    if C.PREFIX:
        if block >= item.prefix_end:
            tma_load(source, [item.kv_head, item.k_start + block, 0], full, smem.index(stage))
        elif C.PAGE_SIZE:
            _load_pages(prefix, item, block, stage, smem, full, PADDED, C)
        else:
            tma_load(prefix, [item.kv_head, item.prefix_start + block, 0], full, smem.index(stage))
    elif C.PAGE_SIZE:
        _load_pages(source, item, block, stage, smem, full, PADDED, C)
    else:
        tma_load(source, [item.kv_head, item.k_start + block, 0], full, smem.index(stage))


@gluon.jit
def _clear(v, i, block, keys, v_edge, edges, C: gl.constexpr):
    """Puts 0 in the place of a block's values outside of the key range, once they have come: a weight of 0 times NaN is NaN."""
    DV_PADDED: gl.constexpr = C.DV_PADDED
    STAGES: gl.constexpr = C.STAGES
    DOWN: gl.constexpr = C.BLOCK_N // _PART_KEYS
    ACROSS: gl.constexpr = DV_PADDED // PART_DIMS
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    stage = i % STAGES
    parts = parts_of(v.smem, STAGES * DOWN * ACROSS, _PART_KEYS, False)
    mbarrier.wait(v_edge, edges & 1)
    for down in range(DOWN):
        first = block + down * _PART_KEYS
        if first < keys.first or first + _PART_KEYS > keys.end:
            key = first + gl.arange(0, _PART_KEYS, gl.SliceLayout(1, layout))
            inside = ((key >= keys.first) & (key < keys.end))[:, None]
            for across in gl.static_range(ACROSS):
                part = parts.index((stage * ACROSS + across) * DOWN + down)
                values = part.load(layout)
                part.store(gl.where(inside, values, gl.zeros_like(values)))
    fence_async_shared()
    mbarrier.arrive(v.full.index(stage), count=1)


@gluon.jit
def _two_flags(flags):
    """Two flags that another kernel writes; what comes next reads after what they say."""
    return gl.inline_asm_elementwise(
        "ld.acquire.gpu.global.v2.u32 {$0, $1}, [$2];", "=r,=r,l", [flags], dtype=(gl.int32, gl.int32), is_pure=False, pack=1
    )


@gluon.jit
def _await_rows(begin, end, sources):
    """Waits until the keys of these rows are there. Whether it has found that all are; and the row from which on those before ``end``
    are there: each look is at as many as a warp can see at once, down from ``end``, so that the next blocks need none."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    place = gl.arange(0, 32, layout)
    last = (end - 1) // _PIECE_ROWS
    # Pieces side by side in pairs. The last thread looks what turn it is, and whether all pieces are there.
    pair = last // 2 - place
    is_pair = (pair >= 0) & (place < _PAIRS)
    late = sources.late + 2 * pair
    late0 = gl.load(late, mask=is_pair, other=0) != 0
    late1 = gl.load(late + 1, mask=is_pair & (2 * pair < last), other=0) != 0
    flags = gl.where(late0 | late1, piece_flag(sources.arrived, 2 * pair), sources.arrived)
    first = begin // _PIECE_ROWS
    is_needed0 = 2 * pair >= first
    is_needed1 = 2 * pair + 1 >= first
    all_here = 0
    missing = 1
    missing0 = late0
    missing1 = late1
    while missing > 0:
        words0, words1 = _two_flags(flags)
        turn = gl.sum(gl.where(place == _PAIRS, words0, 0), 0)
        all_here = gl.max(gl.where((place == _PAIRS) & (words1 == turn), 1, 0), 0)
        missing0 = late0 & (words0 != turn)
        missing1 = late1 & (words1 != turn)
        missing = gl.max(gl.where((missing0 & is_needed0) | (missing1 & is_needed1), 1, 0), 0) * (1 - all_here)
    # Copies by TMA are ordered apart from other reads.
    gl.inline_asm_elementwise("fence.proxy.async; mov.u32 $0, $1;", "=r,r", [place], dtype=gl.int32, is_pure=False, pack=1)
    missing_piece = gl.max(gl.where(missing1, 2 * pair + 1, gl.where(missing0, 2 * pair, -1)), 0)
    here_from = gl.maximum(missing_piece + 1, 2 * (last // 2 - _PAIRS + 1)) * _PIECE_ROWS
    return all_here, here_from


@gluon.jit
def _await_block(brought, block, item, sources, C: gl.constexpr):
    """Waits until a key block of the item is there, if it is not known to be."""
    BLOCK_N: gl.constexpr = C.BLOCK_N
    # A block may begin in the midst of a piece, and the last of its pieces be the first of a pair.
    gl.static_assert(BLOCK_N // _PIECE_ROWS + 1 < 2 * _PAIRS, "a warp cannot look at all pieces of a block")
    all_here = brought.all_here
    here_from = brought.here_from
    may_come = block >= item.prefix_end
    if C.OWN:
        may_come = may_come & (block < item.own_begin)
    first = item.k_start + gl.maximum(block, item.keys.first)
    if (all_here == 0) & may_come & (first < here_from):
        all_here, here_from = _await_rows(first, item.k_start + gl.minimum(block + BLOCK_N, item.keys.end), sources)
    return Brought(brought.blocks, brought.queries0, brought.queries1, brought.edges, all_here, here_from)


@gluon.jit
def _bring(brought, waiting, block, item, sources, channels, C: gl.constexpr):
    """Brings one key block of an item, from the last one down. Returns the new counts of what has been brought, and of stored keys the
    block that is on its way."""
    if C.STORED:
        brought, waiting = bring_stored(brought, waiting, block, item, sources, channels, C)
    else:
        brought = _bring_block(brought, block, item, sources, channels, C)
    return brought, waiting


@gluon.jit
def _bring_block(brought, block, item, sources, channels, C: gl.constexpr):
    """Brings one key block, and with an item's last one, which is the first to be visited, the queries; values that have to be
    cleared come with ``channels.v_edge``. Returns the new counts of what has been brought."""
    BLOCK_N: gl.constexpr = C.BLOCK_N
    STAGES: gl.constexpr = C.STAGES
    i = brought.blocks
    stage = i % STAGES
    last = last_block(item.keys, C)
    if C.WAITS:
        brought = _await_block(brought, block, item, sources, C)
    wait_empty(channels.k, i, STAGES)
    # K may hold anything outside of the range: its scores are masked.
    _load_block(
        sources.k, sources.k_prefix, sources.k_own, item, block, stage, channels.k.smem, channels.k.full.index(stage), C.D_PADDED, C
    )
    if C.Q_TMA:  # noqa: SIM102, as this one is for the compiler
        # After the first keys, which need not wait until the warpgroups are done with the last queries.
        if block == last:
            brought = bring_queries(brought, item, sources, channels.q, C)
    edges = brought.edges
    # Not at once: these keys are on their way meanwhile.
    if block + BLOCK_N == last and last + BLOCK_N > item.keys.end:
        _clear(channels.v, i - 1, last, item.keys, channels.v_edge, edges, C)
        edges += 1
    wait_empty(channels.v, i, STAGES)
    is_edge = block < item.keys.first or block + BLOCK_N > item.keys.end
    if is_edge:
        _load_block(sources.v, sources.v_prefix, sources.v_own, item, block, stage, channels.v.smem, channels.v_edge, C.DV_PADDED, C)
    else:
        _load_block(
            sources.v, sources.v_prefix, sources.v_own, item, block, stage, channels.v.smem, channels.v.full.index(stage), C.DV_PADDED, C
        )
    return Brought(i + 1, brought.queries0, brought.queries1, edges, brought.all_here, brought.here_from)


@gluon.jit
def _threads(C: gl.constexpr):
    """A number for each of the producer's threads."""
    return gl.arange(0, 32 * C.PRODUCER_WARPS, gl.BlockedLayout([1], [32], [C.PRODUCER_WARPS], [0]))


@gluon.jit
def _draw(counter, draws, C: gl.constexpr):
    """The number of the next item in the queue, for the first thread: so that none waits for it until :func:`_drawn` asks for it."""
    place = _threads(C)
    return gl.atomic_add(counter + place * 0, place * 0 + 1, mask=(place == 0) & draws, sem="relaxed")


@gluon.jit
def _drawn(places, draws, num_items, C: gl.constexpr):
    """The number that was drawn; ``num_items``, of which there is no item, if none was."""
    place = _threads(C)
    return gl.where(draws, gl.max(gl.where(place == 0, places, 0), 0), num_items)


@gluon.jit
def _leave(counter):
    """The last program to end leaves the counters as they were."""
    if gl.atomic_add(counter + 1, 1, sem="acq_rel") == gl.num_programs(0) - 1:
        gl.store(counter, 0)
        gl.store(counter + 1, 0)


@gluon.jit
def _find_item(number, run, C: gl.constexpr):
    """The ``number``-th item as ``tile * C.HEADS + head``."""
    tile, head = find_in_run(number, run, C)
    return tile * C.HEADS + head


@gluon.jit
def _item_of(number, tile, k_start, sources, tiles, window, C: gl.constexpr):
    """What to bring for an item."""
    first_head = number % C.HEADS * C.PACK
    line = PageLine(sources.page_table, sources.stride_page)
    if C.PAGE_SIZE:
        pointer = load_page_line(sources.page_table, sources.stride_request, tiles, number // C.HEADS)
        line = PageLine(pointer, sources.stride_page)
    prefix_end = 0
    prefix_start = 0
    if C.PREFIX:
        places = sources.prefix_places + 2 * load_request(tiles, number // C.HEADS)
        prefix_end = gl.load(places)
        prefix_start = gl.load(places + 1)
    own_begin = 0
    own_start = 0
    if C.OWN:
        places = sources.own_places + 2 * load_request(tiles, number // C.HEADS)
        own_begin = gl.load(places)
        own_start = gl.load(places + 1)
    keys = keys_seen(tile, window, C)
    return Item(
        tile.q_begin, tile.q_count, first_head, first_head // C.GROUP, k_start, keys, line, prefix_end, prefix_start, own_begin, own_start
    )


@gluon.jit
def produce(sources, queue, channels, window, C: gl.constexpr):
    """Draws items and brings what they need, until there are none.

    An item is drawn when the one before has three blocks to go: late, so that no program keeps one from another that would
    be sooner, but early enough for three reads of memory that follow from each other: the number, the run, the tile.
    Where there is a program for each item there is no queue: those reads would come before the first keys.
    So the two blocks that are visited last are written out: draw, the second, find the run, the first, load the tile, and only
    then clear that block's values where it has to be, which takes as long as that load.

    A tile's blocks are visited from the last one down. So it begins with the keys of its own rank, while others may be on
    their way.
    """
    HEADS: gl.constexpr = C.HEADS
    BLOCK_N: gl.constexpr = C.BLOCK_N
    n = 0
    brought = Brought(0, 0, 0, 0, 0, _NO_ROW)
    waiting = Waiting(0, 0, 0, 0, 0, 0)
    if C.STORED:
        waiting = nothing_yet(sources.k, C)
    # Fixed spans have tiles to spare.
    num_items = gl.load(queue.limits) * HEADS
    quota = gl.load(queue.limits + 1)
    has_queue = num_items > gl.num_programs(0)
    number = gl.program_id(0)
    item_number = number
    tile, k_start = load_tile(queue.tiles, item_number // HEADS)
    if has_queue:
        number = _drawn(_draw(queue.counter, True, C), True, num_items, C)
        run = load_run(queue.tiles, gl.minimum(number, num_items - 1), C)
        item_number = _find_item(gl.minimum(number, num_items - 1), run, C)
        tile, k_start = load_tile(queue.tiles, item_number // HEADS)
    while number < num_items:
        put_item(channels.items, n, item_number, C.PRODUCER_WARPS)
        n += 1
        item = _item_of(item_number, tile, k_start, sources, queue.tiles, window, C)
        if C.WAITS:
            brought = Brought(brought.blocks, brought.queries0, brought.queries1, brought.edges, brought.all_here, _NO_ROW)
        begin = item.keys.begin
        end = item.keys.end
        if C.STORED:  # noqa: SIM102, as this one is for the compiler
            # The consumers take an item only when they have all of those before it, and the next but one is not put before that.
            if begin >= end:
                brought, waiting = finish_stored(brought, waiting, sources, channels, C)
        last = last_block(item.keys, C)
        for left in range(begin, last - BLOCK_N, BLOCK_N):
            brought, waiting = _bring(brought, waiting, last - (left - begin), item, sources, channels, C)
        draws = has_queue & (n < quota)
        places = _draw(queue.counter, draws, C)
        for _second in range(gl.maximum(begin, last - BLOCK_N), last, BLOCK_N):
            brought, waiting = _bring(brought, waiting, begin + BLOCK_N, item, sources, channels, C)
        number = _drawn(places, draws, num_items, C)
        run = load_run(queue.tiles, gl.minimum(number, num_items - 1), C)
        for _first in range(last, end, BLOCK_N):
            brought, waiting = _bring(brought, waiting, begin, item, sources, channels, C)
        item_number = _find_item(gl.minimum(number, num_items - 1), run, C)
        tile, k_start = load_tile(queue.tiles, item_number // HEADS)
        if not C.STORED:  # noqa: SIM102, as this one is for the compiler
            if begin < end and (begin < item.keys.first or begin + BLOCK_N > end):
                _clear(channels.v, brought.blocks - 1, begin, item.keys, channels.v_edge, brought.edges, C)
                brought = Brought(
                    brought.blocks, brought.queries0, brought.queries1, brought.edges + 1, brought.all_here, brought.here_from
                )
    if C.STORED:
        brought, waiting = finish_stored(brought, waiting, sources, channels, C)
    put_item(channels.items, n, -1, C.PRODUCER_WARPS)
    if has_queue:
        _leave(queue.counter)
    if C.WAITS:
        # Who comes after this launch comes after the one that it was launched beside as well.
        place = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
        gl.inline_asm_elementwise("griddepcontrol.wait; mov.u32 $0, $1;", "=r,r", [place], dtype=gl.int32, is_pure=False, pack=1)
