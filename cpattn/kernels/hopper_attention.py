"""The host side of the attention kernel for Hopper (:mod:`cpattn.kernels.hopper_kernel`)."""

# mypy: allow-untyped-calls
from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from cpattn.kernels.arguments import Blocks, alignment, as_words, fits_descriptor
from cpattn.kernels.attention_config import MOST_DIM_WITH_ROOM, REGISTERS_WITH_ROOM, HopperConfig
from cpattn.kernels.hopper_items import PART_DIMS
from cpattn.kernels.hopper_kernel import hopper_attention_kernel
from cpattn.kernels.launch import Launcher, LaunchFunction
from cpattn.kernels.tile_shapes import TileShape, stored_blocks
from cpattn.kernels.tiles import WARPGROUP_ROWS, Launch
from cpattn.kernels.work_queue import counter_for_launch
from cpattn.keys import Keys

_attention = Launcher(hopper_attention_kernel)


def launch(
    work: Launch, q: Tensor, keys: Keys, *, tensors: dict[str, int], arguments: dict[str, Any], config: dict[str, Any]
) -> LaunchFunction:
    """What launches the programs of ``work``; ``arguments`` and ``config`` are those that the other kernel has as well, and
    ``tensors`` those of all that are given at each launch (:meth:`cpattn.kernels.launch.Launcher.prepare`).

    k and v must suit a tensor descriptor, and :func:`cpattn.kernels.tile_shapes.has_specialized` say that there is a kernel. Keys that are
    stored in another dtype than q's are given by pointers, and 8-byte alignment is enough for them.
    """
    k, v, arrivals, prefix, own = keys.k, keys.v, keys.arrivals, keys.prefix, keys.own
    waits = arrivals is not None
    # What is not there is not looked at.
    none = work.limits
    block_n, d_padded, dv_padded = config["BLOCK_N"], config["D_PADDED"], config["DV_PADDED"]
    # As many keys of a block as lie in one page for certain.
    page_size = config["PAGE_SIZE"]
    page_keys = min(block_n, page_size & -page_size)
    is_stored = config["STORED"]
    # Rows of whole tokens, and a plain copy.
    q_tma = fits_descriptor(q) and WARPGROUP_ROWS % work.pack == 0 and config["Q_SIGN"] == 1
    q_block = (WARPGROUP_ROWS // work.pack, work.pack, d_padded)
    leaves_room = arrivals is not None and arrivals.side_by_side
    if leaves_room and (is_stored or max(d_padded, dv_padded) > MOST_DIM_WITH_ROOM):
        raise AssertionError("keys that come beside an attention that has no registers to spare")
    options = {"num_warps": 4} | ({"launch_pdl": True} if waits else {}) | ({"maxnreg": REGISTERS_WITH_ROOM} if leaves_room else {})
    return _attention.prepare(
        (work.num_programs, 1), options,
        tensors | {"counter": max(tensors.values()) + 1}, of_each_launch=partial(counter_for_launch, q.device),
        q=Blocks(q, list(q.shape), list(q.stride()), q_block, _descriptor) if q_tma else q, q_pointer=q,
        k=as_words(k) if is_stored else _blocks(k, block_n, d_padded, page_keys),
        v=as_words(v) if is_stored else _blocks(v, block_n, dv_padded, page_keys),
        limits=work.limits, counter=work.limits,
        arrived=none if arrivals is None else arrivals.flags, late=none if arrivals is None else arrivals.late,
        k_prefix=none if prefix is None else _blocks(prefix.k, block_n, d_padded, page_keys),
        v_prefix=none if prefix is None else _blocks(prefix.v, block_n, dv_padded, page_keys),
        prefix_places=none if prefix is None else prefix.places,
        k_own=none if own is None else _blocks(own.k, block_n, d_padded, block_n),
        v_own=none if own is None else _blocks(own.v, block_n, dv_padded, block_n),
        own_places=none if own is None else own.places,
        C=HopperConfig(
            **config, STAGES=key_blocks(work.shape, leaves_room), Q_TMA=q_tma, PAGE_KEYS=page_keys, WAITS=waits, ROOM=leaves_room,
            PREFIX=prefix is not None, OWN=own is not None, RAW=stored_blocks(q.shape[2], v.shape[-1], k.dtype) if is_stored else 0,
            COPIED=min(alignment(k), alignment(v)) if is_stored else 0, CONSUMERS=work.shape.warpgroups,
        ),
        **arguments,
    )  # fmt: skip


def key_blocks(shape: TileShape, leaves_room: bool) -> int:
    """How many shared memory holds: where programs run beside the attention, with bytes of their own in it, no more than it takes."""
    return 2 if leaves_room else shape.key_blocks


def _blocks(x: Tensor, block_n: int, padded: int, page_keys: int) -> Blocks:
    """As in the other kernel; or of pages, with blocks ``[1 page, 1 head, page_keys, PART_DIMS]``."""
    *pages, tokens, heads, dim = x.shape
    *page_stride, stride_row, stride_head, _ = x.stride()
    block = (1, 1, page_keys, PART_DIMS.value) if pages else (1, block_n, padded)
    return Blocks(x, [*pages, heads, tokens, dim], [*page_stride, stride_head, stride_row, 1], block, _descriptor)


def _descriptor(x: Tensor, shape: list[int], strides: list[int], block: list[int]) -> Any:
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16)
    return TensorDescriptor(x, shape, strides, block, layout)
