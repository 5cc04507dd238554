"""Attention over spans in one launch: choosing tiles and a kernel, and launching it.

The device code is in :mod:`cpattn.kernels.ragged_kernel`, and for Hopper in :mod:`cpattn.kernels.hopper_kernel`.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from cpattn.current import is_on_current_device
from cpattn.kernels.arguments import Blocks, alignment, as_words, fits_descriptor
from cpattn.kernels.attention_config import RaggedConfig
from cpattn.kernels.launch import Launcher, LaunchFunction, launch_nothing
from cpattn.kernels.ragged_kernel import ragged_attention_kernel
from cpattn.kernels.release import HOPPER_KERNEL, warn_if_slow
from cpattn.kernels.stored_numbers import fp8_is_native, fp8_kind
from cpattn.kernels.tile_shapes import TileShape, has_specialized, packs_for, padded_dims, stored_shapes, tile_shapes, warn_of_tile_file
from cpattn.kernels.tiles import Launch, launch_for
from cpattn.keys import Keys
from cpattn.options import AttentionOptions
from cpattn.spans import Spans

_LOG2_E = math.log2(math.e)

_attention = Launcher(ragged_attention_kernel)


def ragged_attention(
    q: Tensor, keys: Keys, spans: Spans, options: AttentionOptions, out_dtype: torch.dtype | None = None,
    into: tuple[Tensor, Tensor] | None = None, *, result: tuple[Tensor, Tensor] | None = None,
    shapes: tuple[TileShape, ...] | None = None, packs: tuple[int, ...] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attends all spans in one launch; the meaning is that of :class:`cpattn.attention.backend.AttentionFunction`.

    Args:
        q: ``[T, Hq, D]``, fp32, bf16 or fp16, the last axis contiguous.
        keys: of the same dtype, or stored in another, fp8 with its scales included. Where v is a view of k's first columns
            (multi-head latent attention: D = 576, Dv = 512), these are loaded once.
        spans: the work, on the same device.
        options: scale, window, softcap, sinks.
        out_dtype: of the result; q's by default.
        into: an earlier result ``(acc fp32 [T, Hq, Dv], lse fp32 [T, Hq])`` over other keys, into which this one is
            merged in place, in fp32; what has no keys here is left as it is. ``out_dtype`` then does not apply.
        result: memory for the result, ``(out [T, Hq, Dv], lse fp32 [T, Hq])``, which may be strided; ``out_dtype`` then does not apply.
        shapes: tile shapes to choose from; by default those for this head dim, dtype and GPU.
        packs: query heads of one KV head that may share a tile, to choose from; by default 1 and as many as fit.

    Returns:
        ``(out [T, Hq, Dv], lse fp32 [T, Hq])``, or ``into``, or ``result``. Rows of q beyond the last query range are not written.
    """
    k, v, page_table, k_scale, v_scale, arrivals, prefix, own = keys
    if into is not None:
        out, lse = into
    elif result is not None:
        out, lse = result
    else:
        num_queries, num_heads, _ = q.shape
        width, device = v.shape[-1], q.device
        # With strides, as new_empty() takes half a microsecond more.
        out = torch.empty_strided((num_queries, num_heads, width), (num_heads * width, width, 1), dtype=out_dtype or q.dtype, device=device)
        lse = torch.empty_strided((num_queries, num_heads), (num_heads, 1), dtype=torch.float32, device=device)
    sinks = options.sinks
    # All that decides the launch, beside the spans and the tensors' addresses; of these, what a descriptor can take, and
    # whether V is K's first columns.
    k_address, v_address = k.data_ptr(), v.data_ptr()
    key = (
        q.shape, q.stride(), q.dtype, k.shape, k.stride(), k.dtype, v.shape, v.stride(), v.dtype, k_address == v_address,
        (k_address | v_address) % 16, q.data_ptr() % 16 == 0, out.stride(), out.dtype, lse.stride(), into is None,
        options.scale, options.window, options.softcap, None if sinks is None else sinks.dtype,
        None if page_table is None else (page_table.stride(), page_table.dtype),
        None if arrivals is None else arrivals.side_by_side,
        None if prefix is None else (
            prefix.k.shape, prefix.k.stride(), prefix.v.shape, prefix.v.stride(),
            None if prefix.page_table is None else (prefix.page_table.stride(), prefix.page_table.dtype),
        ),
        None if own is None else (own.k.shape, own.k.stride(), own.v.shape, own.v.stride()), shapes, packs,
        None if k_scale is None or v_scale is None else (k_scale.stride(), v_scale.stride(), k_scale.data_ptr() == v_scale.data_ptr()),
    )  # fmt: skip
    launch = spans.derive(key, _prepare, q, keys, spans, options, out, lse, into is not None, shapes, packs)
    tensors: tuple[Tensor, ...] = (q, k, v, out, lse, lse if sinks is None else sinks)
    if page_table is not None:
        tensors += (page_table,)
    if arrivals is not None:
        tensors += arrivals.flags, arrivals.late
    if prefix is not None:
        tensors += prefix.k, prefix.v, prefix.places
        if prefix.page_table is not None:
            tensors += (prefix.page_table,)
    if own is not None:
        tensors += own
    if k_scale is not None and v_scale is not None:
        tensors += k_scale, v_scale
    if is_on_current_device(q):
        launch(*tensors)
    else:
        # Changing the device costs microseconds even if it is the current one.
        with torch.cuda.device_of(q):
            launch(*tensors)
    return out, lse


def _mean_the_same(keys: Keys) -> bool:
    """Whether numbers of K and V, where they lie in one place, are the same: multiplied by the same scale."""
    k_scale, v_scale = keys.k_scale, keys.v_scale
    if k_scale is None or v_scale is None:
        return True
    return k_scale.data_ptr() == v_scale.data_ptr() and k_scale.stride() == v_scale.stride()


# Which of the tensors above the kernels' parameters are.
_TENSORS = {"q": 0, "q_pointer": 0, "k": 1, "v": 2, "out": 3, "lse": 4, "sinks": 5}


def _tensors_of(keys: Keys) -> dict[str, int]:
    """With those that only some keys have."""
    more = [] if keys.page_table is None else ["page_table"]
    more += [] if keys.arrivals is None else ["arrived", "late"]
    more += [] if keys.prefix is None else ["k_prefix", "v_prefix", "prefix_places"]
    more += [] if keys.prefix is None or keys.prefix.page_table is None else ["page_table"]
    more += [] if keys.own is None else ["k_own", "v_own", "own_places"]
    more += [] if keys.k_scale is None else ["k_scale", "v_scale"]
    return _TENSORS | {name: len(_TENSORS) - 1 + i for i, name in enumerate(more)}


def _prepare(
    q: Tensor, keys: Keys, spans: Spans, options: AttentionOptions, out: Tensor, lse: Tensor, into: bool,
    shapes: tuple[TileShape, ...] | None, packs: tuple[int, ...] | None,
) -> LaunchFunction:  # fmt: skip
    """What launches the kernel over these spans, given the tensors alone."""
    k, v = keys.k, keys.v
    num_heads, head_dim, v_head_dim = q.shape[1], q.shape[2], v.shape[-1]
    processors, capability = device_properties(q.device)
    dims = padded_dims(head_dim, v_head_dim)
    # V as K's first columns, where the two blocks in shared memory are of one size.
    v_in_k = v.data_ptr() == k.data_ptr() and v.stride() == k.stride() and dims.d == dims.dv and _mean_the_same(keys)
    is_stored = k.dtype != q.dtype
    # That kernel copies 16 bytes at a time, or 8 of keys that are stored in other numbers: of a message with a scale for each token.
    is_aligned = min(alignment(k), alignment(v)) >= 8 if is_stored else fits_descriptor(k) and fits_descriptor(v)
    if shapes is None:
        specialized = specialized_kernel(q.device) is not None and (not is_stored or (is_aligned and _may_specialize(q, keys)))
        if is_stored and specialized:
            shapes = stored_shapes(head_dim, v_head_dim, q.dtype, k.dtype)
        else:
            shapes = tile_shapes(head_dim, v_head_dim, q.dtype, capability, specialized, v_in_k)
    has_sources = keys.prefix is not None or keys.own is not None
    if has_sources:
        # The only kernel that has several.
        shapes = tuple(shape for shape in shapes if shape.specialized)
    if packs is None:
        packs = packs_for(num_heads // k.shape[-2], shapes[0].block_m)
    work = launch_for(spans, shapes, packs, num_heads, options.window, processors)
    if work.num_tiles == 0:
        return launch_nothing

    tma = work.shape.tma and not is_stored and is_aligned
    hopper_kernel = specialized_kernel(q.device) if work.shape.specialized and is_aligned and _may_specialize(q, keys) else None
    warn_of_tile_file()
    if q.is_cuda:
        warn_if_slow(_may_specialize(q, keys))
    tensors = _tensors_of(keys)
    arguments = _arguments(q, keys, options, out, lse, work) | _sources(keys, work)
    config = _config(q, keys, options, into, work)
    if has_sources and hopper_kernel is None:
        raise AssertionError("keys in several places, for which no kernel is there")
    if hopper_kernel is not None:
        launch: LaunchFunction = hopper_kernel.launch(work, q, keys, tensors=tensors, arguments=arguments, config=config)
        return launch
    tma = tma and keys.page_table is None
    return _attention.prepare(
        (work.num_tiles * (num_heads // work.pack), 1), {"num_warps": work.shape.num_warps, "num_stages": work.shape.num_stages},
        tensors, q=q,
        k=_blocks(k, work.shape.block_n, dims.d) if tma else as_words(k),
        v=_blocks(v, work.shape.block_n, dims.dv) if tma else as_words(v),
        C=RaggedConfig(
            **config, D_TAIL=dims.d_tail, D_TAIL_PADDED=dims.d_tail_padded, BLOCK_M=work.shape.block_m, TMA=tma,
            V_IN_K=v_in_k and not tma, NATIVE=fp8_is_native(capability, not _attention.roles),
        ),
        **arguments,
    )  # fmt: skip


def _may_specialize(q: Tensor, keys: Keys) -> bool:
    """Whether keys of such dims and dtypes are ones that the kernel for Hopper takes, on a GPU that has it."""
    _, capability = device_properties(q.device)
    return has_specialized(q.shape[2], keys.v.shape[-1], q.dtype, capability, _page_size(keys), keys.k.dtype)


def _arguments(q: Tensor, keys: Keys, options: AttentionOptions, out: Tensor, lse: Tensor, work: Launch) -> dict[str, Any]:
    """What both kernels are given."""
    page_table, sinks, softcap = keys.page_table if keys.prefix is None else keys.prefix.page_table, options.sinks, options.softcap
    # The sign of the scale goes into q: see _config. With a scale of 0 all scores are 0, as they are with a q of 0.
    magnitude = abs(options.scale) or 1.0
    return {
        "out": out, "lse": lse, "sinks": lse if sinks is None else sinks, "tiles": work.table,
        "page_table": work.table if page_table is None else page_table,
        "q_stride_row": q.stride(0), "q_stride_head": q.stride(1),
        "page_table_stride_request": 0 if page_table is None else page_table.stride(0),
        "page_table_stride_page": 0 if page_table is None else page_table.stride(1),
        "out_stride_row": out.stride(0), "out_stride_head": out.stride(1),
        "lse_stride_row": lse.stride(0), "lse_stride_head": lse.stride(1),
        "tanh_scale": 1.0 if softcap is None else magnitude / softcap,
        "exponent_scale": _LOG2_E * (magnitude if softcap is None else softcap),
        "window": 0 if options.window is None else options.window,
    }  # fmt: skip


def _sources(keys: Keys, work: Launch) -> dict[str, Any]:
    """Strides of keys that are given by pointers, and their scales with theirs."""
    arguments: dict[str, Any] = {}
    for name, x in (("k", keys.k), ("v", keys.v)):
        arguments |= {f"{name}_page_stride": x.stride(0), f"{name}_stride_row": x.stride(-3), f"{name}_stride_head": x.stride(-2)}
    for name, scale in (("k_scale", keys.k_scale), ("v_scale", keys.v_scale)):
        strides = (0, 0, 0) if scale is None else (0, 0, 0, *scale.stride())[-3:]
        arguments |= {name: work.table if scale is None else scale}
        arguments |= {f"{name}_{axis}": stride for axis, stride in zip(("page_stride", "stride_row", "stride_head"), strides, strict=True)}
    return arguments


def _config(q: Tensor, keys: Keys, options: AttentionOptions, into: bool, work: Launch) -> dict[str, Any]:
    """The fields of :class:`cpattn.kernels.attention_config.AttentionConfig`."""
    dims = padded_dims(q.shape[2], keys.v.shape[-1])
    return {
        "NUM_HEADS": q.shape[1], "GROUP": q.shape[1] // keys.k.shape[-2], "PACK": work.pack,
        "D": q.shape[2], "DV": keys.v.shape[-1], "D_PADDED": dims.d, "DV_PADDED": dims.dv, "BLOCK_N": work.shape.block_n,
        # The running maximum is taken before scaling, which needs a positive scale.
        "Q_SIGN": (options.scale > 0) - (options.scale < 0),
        "WINDOW": options.window is not None, "SOFTCAP": options.softcap is not None, "SINKS": options.sinks is not None, "INTO": into,
        "PAGE_SIZE": _page_size(keys), "STORED": keys.k.dtype != q.dtype, "FP8": fp8_kind(keys.k.dtype),
        "SCALED": keys.k_scale is not None, "OF_TOKENS": _are_of_tokens(keys),
    }  # fmt: skip


def _are_of_tokens(keys: Keys) -> bool:
    """Whether there is a scale for each token."""
    return keys.k_scale is not None and keys.k_scale.ndim > 1


def _page_size(keys: Keys) -> int:
    """Tokens of a page, of all keys or of the prefixes; 0 where there are none."""
    return keys.page_size if keys.prefix is None else keys.prefix.page_size


def specialized_kernel(device: torch.device) -> Any:
    """The module of the kernel for Hopper, or None where this GPU or this Triton cannot run it."""
    if device_properties(device)[1] != (9, 0) or not HOPPER_KERNEL.is_open(device):
        return None
    # It takes a release of Triton that has Gluon.
    from cpattn.kernels import hopper_attention

    return hopper_attention


@lru_cache
def device_properties(device: torch.device) -> tuple[int, tuple[int, int]]:
    """Multiprocessors and compute capability; the interpreter stands in for an SM90."""
    if device.type != "cuda":
        return 132, (9, 0)
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, (properties.major, properties.minor)


def _blocks(x_SHD: Tensor, block_n: int, padded: int) -> Blocks:
    """Blocks ``[1 head, block_n keys, padded]``; the unit axis leads, so that the compiler can drop it."""
    tokens, heads, dim = x_SHD.shape
    return Blocks(x_SHD, [heads, tokens, dim], [x_SHD.stride(1), x_SHD.stride(0), 1], (1, block_n, padded), TensorDescriptor)


def _problem(device: torch.device) -> str | None:
    """It compiles kernels: imported only where it is needed."""
    from cpattn.kernels.self_check import problem_of_hopper_kernel

    return problem_of_hopper_kernel(device, ragged_attention)


HOPPER_KERNEL.check = _problem
