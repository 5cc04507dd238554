"""Device code for Hopper: what the producer warp and the two consumer warpgroups hand each other in shared memory.

A channel has buffers and two barriers for each: one that it has been filled, one that it has been emptied. Both sides count
what has passed through it: the ``i``-th thing lies in buffer ``i % slots``, and each barrier flips once a turn.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

# Items that the producer is ahead.
ITEMS = gl.constexpr(2)


class Channel(NamedTuple):
    """Buffers, ``[slots, ...]``, and the barriers of each, ``[slots, 1]``."""

    smem: Any
    full: Any
    empty: Any


class Channels(NamedTuple):
    """All that the warps hand each other.

    Attributes:
        items: ITEMS slots: which item comes next; -1 after the last.
        q: a slot for each consumer, which only that one empties.
        k, v: C.STAGES slots of key blocks; all consumers empty them.
        v_edge: the barrier of values that the producer waits for itself, to clear some of them before it says that they are there.
    """

    items: Any
    q: Any
    k: Any
    v: Any
    v_edge: Any


@gluon.jit
def allocate(smem, SLOTS: gl.constexpr):
    """The channel that has these buffers."""
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    return Channel(smem, full, empty)


@gluon.jit
def initialize(channel, SLOTS: gl.constexpr, READERS: gl.constexpr):
    """A buffer is filled by one and emptied by READERS."""
    for i in gl.static_range(SLOTS):
        mbarrier.init(channel.full.index(i), count=1)
        mbarrier.init(channel.empty.index(i), count=READERS)


@gluon.jit
def wait_full(channel, i, SLOTS: gl.constexpr):
    """Waits until the ``i``-th thing is there."""
    mbarrier.wait(channel.full.index(i % SLOTS), (i // SLOTS) & 1)


@gluon.jit
def wait_empty(channel, i, SLOTS: gl.constexpr):
    """Waits until there is room for the ``i``-th thing."""
    mbarrier.wait(channel.empty.index(i % SLOTS), (i // SLOTS) & 1 ^ 1)


@gluon.jit
def release(channel, i, SLOTS: gl.constexpr):
    """The ``i``-th thing is no longer needed here."""
    mbarrier.arrive(channel.empty.index(i % SLOTS), count=1)


@gluon.jit
def put_item(items, n, item, WARPS: gl.constexpr):
    """Tells the consumers the program's ``n``-th item; -1 if there is none. WARPS say so together."""
    wait_empty(items, n, ITEMS)
    slot = n % ITEMS
    items.smem.index(slot).store(gl.full([1], 0, gl.int32, gl.BlockedLayout([1], [32], [WARPS], [0])) + item)
    mbarrier.arrive(items.full.index(slot), count=1)


@gluon.jit
def take_item(items, n):
    """The program's ``n``-th item; -1 if there is none."""
    wait_full(items, n, ITEMS)
    item = gl.max(items.smem.index(n % ITEMS).load(gl.BlockedLayout([1], [32], [4], [0])), 0)
    release(items, n, ITEMS)
    return item
