"""Device code: the attention kernel for Hopper, in Gluon: what :mod:`cpattn.kernels.ragged_kernel` computes, with roles for
the warps.

The arithmetic and its order are those of that kernel, and so are the bits of the result, but over fp8 without scales of tokens
(:mod:`cpattn.kernels.hopper_half`); what differs is who waits for what. One warp brings queries and key blocks into shared memory;
two warpgroups own 64 rows of the tile each, so that one's products run during the other's softmax; or there is one, for tiles of 64 rows
(:func:`cpattn.kernels.tile_shapes.stored_shapes`). A program has a multiprocessor to itself, but for the few
warps that C.ROOM leaves room for. It computes one item after another, so that
the next one's keys are on their way while a result is written. It draws them from a queue, so that all are busy to the end and items that
share keys run side by side. In long launches it ends after a while and gives way.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from cpattn.kernels.hopper_channels import ITEMS, Channels, allocate, initialize
from cpattn.kernels.hopper_consumer import QueryRows, consume
from cpattn.kernels.hopper_half import Scales
from cpattn.kernels.hopper_items import Queue, Sources
from cpattn.kernels.hopper_producer import produce
from cpattn.kernels.hopper_stored import StoredKeys, allocate_raw
from cpattn.kernels.online_softmax import Output, Scoring
from cpattn.kernels.tile_keys import Source
from cpattn.kernels.tiles import WARPGROUP_ROWS

_ROWS = gl.constexpr(WARPGROUP_ROWS)


@gluon.jit
def _make_channels(DTYPE: gl.constexpr, C: gl.constexpr):
    BLOCK_N: gl.constexpr = C.BLOCK_N
    D_PADDED: gl.constexpr = C.D_PADDED
    DV_PADDED: gl.constexpr = C.DV_PADDED
    STAGES: gl.constexpr = C.STAGES
    # With a descriptor, rows of whole tokens.
    TOKENS: gl.constexpr = _ROWS // C.PACK if C.Q_TMA else _ROWS
    HEADS: gl.constexpr = C.PACK if C.Q_TMA else 1
    KEY_DTYPE: gl.constexpr = gl.float16 if C.HALF else DTYPE
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TOKENS, HEADS, D_PADDED], DTYPE)
    k_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, BLOCK_N, D_PADDED], KEY_DTYPE)
    v_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, BLOCK_N, DV_PADDED], KEY_DTYPE)
    q_smem = gl.allocate_shared_memory(DTYPE, [C.CONSUMERS, TOKENS, HEADS, D_PADDED], q_layout)
    k_smem = gl.allocate_shared_memory(KEY_DTYPE, [STAGES, 1, BLOCK_N, D_PADDED], k_layout)
    v_smem = gl.allocate_shared_memory(KEY_DTYPE, [STAGES, 1, BLOCK_N, DV_PADDED], v_layout)
    items = allocate(gl.allocate_shared_memory(gl.int32, [ITEMS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0])), ITEMS)
    q = allocate(q_smem, C.CONSUMERS)
    v_edge = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    k = allocate(k_smem, STAGES)
    v = allocate(v_smem, STAGES)
    mbarrier.init(v_edge.index(0), count=1)
    initialize(items, ITEMS, C.CONSUMERS)
    initialize(q, C.CONSUMERS, 1)
    initialize(k, STAGES, C.CONSUMERS)
    initialize(v, STAGES, C.CONSUMERS)
    fence_async_shared()
    return Channels(items, q, k, v, v_edge.index(0))


@gluon.jit(do_not_specialize=["window", "page_table_stride_request"])
def hopper_attention_kernel(
    q, q_pointer, k, v, out, lse, sinks, tiles, limits, counter, arrived, late, k_prefix, v_prefix, prefix_places, k_own, v_own, own_places,
    page_table, page_table_stride_request, page_table_stride_page,
    q_stride_row, q_stride_head, out_stride_row, out_stride_head, lse_stride_row, lse_stride_head,
    tanh_scale, exponent_scale, window, k_scale, v_scale, k_page_stride, k_stride_row, k_stride_head, v_page_stride, v_stride_row,
    v_stride_head, k_scale_page_stride, k_scale_stride_row, k_scale_stride_head, v_scale_page_stride, v_scale_stride_row,
    v_scale_stride_head, C: gl.constexpr,
):  # fmt: skip
    """One of the programs that share all items, ``tile * heads + head`` each. ``counter``, numbers drawn and
    programs that have ended, is 0 before and after a launch. C is a :class:`cpattn.kernels.attention_config.HopperConfig`."""
    channels = _make_channels(q_pointer.dtype.element_ty, C)
    k_scales = Source(k_scale, k_scale_page_stride, k_scale_stride_row, k_scale_stride_head)
    v_scales = Source(v_scale, v_scale_page_stride, v_scale_stride_row, v_scale_stride_head)
    if C.STORED:
        raw = allocate_raw(k.dtype.element_ty, C)
        k_source = Source(k, k_page_stride, k_stride_row, k_stride_head)
        v_source = Source(v, v_page_stride, v_stride_row, v_stride_head)
        k = StoredKeys(k_source, v_source, k_scales, v_scales, raw)
    sources = Sources(
        q, k, v, page_table, page_table_stride_request, page_table_stride_page, arrived, late, k_prefix, v_prefix, prefix_places, k_own,
        v_own, own_places,
    )  # fmt: skip
    queries = QueryRows(q_pointer, q_stride_row, q_stride_head)
    output = Output(out, out_stride_row, out_stride_head, lse, lse_stride_row, lse_stride_head, sinks)
    scoring = Scoring(tanh_scale, exponent_scale)
    scales = Scales(k_scales, v_scales)
    queue = Queue(tiles, limits, counter)
    if C.CONSUMERS == 1:
        gl.warp_specialize(
            [
                (consume, (queries, output, tiles, channels, scoring, scales, window, 0, C)),
                (produce, (sources, queue, channels, window, C)),
            ],
            [C.PRODUCER_WARPS],
            C.REGISTERS,
        )
    else:
        gl.warp_specialize(
            [
                (consume, (queries, output, tiles, channels, scoring, scales, window, 0, C)),
                (consume, (queries, output, tiles, channels, scoring, scales, window, 1, C)),
                (produce, (sources, queue, channels, window, C)),
            ],
            [4, C.PRODUCER_WARPS],
            C.REGISTERS,
        )
