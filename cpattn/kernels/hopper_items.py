"""Device code for Hopper: what bringing an item means, for key blocks as they are and for stored ones.

Suffixes: none of its values is a matrix.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from cpattn.kernels.tiles import WARPGROUP_ROWS

_ROWS = gl.constexpr(WARPGROUP_ROWS)
# Dims of a part of a key block.
PART_DIMS = gl.constexpr(64)
# Triton 3.6 has these under other names than later ones.
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_CAN_REINTERPRET = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


class Sources(NamedTuple):
    """Where queries and keys lie: tensor descriptors, and the page table with its strides. q is one with C.Q_TMA. With C.STORED k is a
    :class:`cpattn.kernels.hopper_stored.StoredKeys`, and v is not looked at. With C.WAITS what has arrived of the keys, as
    :mod:`cpattn.kernels.arrivals` says. With C.PREFIX and C.OWN other keys and values, and for each request which of its keys lie
    there, and where: see :class:`cpattn.keys.PrefixKeys` and :class:`cpattn.keys.OwnRows`."""

    q: Any
    k: Any
    v: Any
    page_table: Any
    stride_request: Any
    stride_page: Any
    arrived: Any
    late: Any
    k_prefix: Any
    v_prefix: Any
    prefix_places: Any
    k_own: Any
    v_own: Any
    own_places: Any


class Queue(NamedTuple):
    """The work: tiles; ``limits``, which says how many there are and how many items a program may compute; and two
    counters, numbers drawn and programs that have ended."""

    tiles: Any
    limits: Any
    counter: Any


class Item(NamedTuple):
    """What is brought for an item: where its queries begin and how many there are, its heads, and its keys, those before
    ``prefix_end`` from the prefixes, and those from ``own_begin`` on from a rank's own rows."""

    q_begin: Any
    q_count: Any
    first_head: Any
    kv_head: Any
    k_start: Any
    keys: Any
    line: Any
    prefix_end: Any
    prefix_start: Any
    own_begin: Any
    own_start: Any


class Brought(NamedTuple):
    """How much has been put into the buffers: key blocks, queries of both consumers, blocks with values to clear; whether all keys are
    known to be there; and the row from which on those of the item are that have been waited for."""

    blocks: Any
    queries0: Any
    queries1: Any
    edges: Any
    all_here: Any
    here_from: Any


@gluon.jit
def looked_at_as(smem, DTYPE: gl.constexpr, shape: gl.constexpr, layout: gl.constexpr):
    """The same shared memory in another shape or dtype."""
    return smem.reinterpret(DTYPE, shape, layout) if _CAN_REINTERPRET else smem._reinterpret(DTYPE, shape, layout)


@gluon.jit
def parts_of(smem, COUNT: gl.constexpr, KEYS: gl.constexpr, LEADING: gl.constexpr):
    """Buffers of key blocks as ``COUNT`` parts ``[KEYS, PART_DIMS]``, with two unit axes before them if LEADING.

    In shared memory a block lies as columns of PART_DIMS, each of all its keys.
    """
    if LEADING:
        paged_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, 1, KEYS, PART_DIMS], smem.dtype)
        parts = looked_at_as(smem, smem.dtype, [COUNT, 1, 1, KEYS, PART_DIMS], paged_layout)
    else:
        layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, PART_DIMS], smem.dtype)
        parts = looked_at_as(smem, smem.dtype, [COUNT, KEYS, PART_DIMS], layout)
    return parts


@gluon.jit
def bring_queries(brought, item, sources, q, C: gl.constexpr):
    """Brings an item's queries. Rows after the tile's end are others' queries, or 0: what they give is not written."""
    BYTES: gl.constexpr = _ROWS * C.D_PADDED * q.smem.dtype.primitive_bitwidth // 8
    TOKENS: gl.constexpr = _ROWS // C.PACK
    queries0 = brought.queries0
    queries1 = brought.queries1
    mbarrier.wait(q.empty.index(0), queries0 & 1 ^ 1)
    mbarrier.expect(q.full.index(0), BYTES)
    tma_load(sources.q, [item.q_begin, item.first_head, 0], q.full.index(0), q.smem.index(0))
    queries0 += 1
    if C.CONSUMERS == 2:  # noqa: SIM102, as this one is for the compiler
        if item.q_count > TOKENS:
            mbarrier.wait(q.empty.index(1), queries1 & 1 ^ 1)
            mbarrier.expect(q.full.index(1), BYTES)
            tma_load(sources.q, [item.q_begin + TOKENS, item.first_head, 0], q.full.index(1), q.smem.index(1))
            queries1 += 1
    return Brought(brought.blocks, queries0, queries1, brought.edges, brought.all_here, brought.here_from)
