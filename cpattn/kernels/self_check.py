"""Small launches that show whether a release of Triton that is not known yet can be trusted with what is fast.

Each takes seconds, for compiling, and waits for the device; :mod:`cpattn.kernels.release` asks once a process, and takes the
slow way if anything is raised here.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from cpattn.kernels.arguments import Blocks
from cpattn.kernels.release import COMPILER_OPTIONS
from cpattn.kernels.tile_shapes import tile_shapes
from cpattn.keys import Keys
from cpattn.options import AttentionOptions
from cpattn.spans import Spans

_ROWS, _COLUMNS = 16, 64
# How much larger the error of one kernel may be than that of another that computes the same.
_SLACK = 1.05


@triton.jit(do_not_specialize=["free"])
def _probe_kernel(
    out, x, blocks, number, one, multiple, wide, free, factor,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """An argument of each kind that kernels take, all of which the result depends on."""
    place = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    value = tl.load(x + place * one).to(tl.float32) * factor
    if DESCRIPTOR:
        value += blocks.load([tl.program_id(0) * ROWS, 0]).to(tl.float32)
    value += number + 10 * multiple + (wide >> 40) + 1000 * free
    tl.store(out + place, value)


def problem_of_direct_launch(device: torch.device, make_launcher: Callable[[Any], Any]) -> str | None:
    """What is wrong with launches by the CUDA driver, which :class:`cpattn.kernels.launch.Launcher` makes, or None.

    They must give what Triton's own launches give, and Triton must tell apart what :func:`cpattn.kernels.launch._kind` tells
    apart, and nothing else.
    """
    with torch.cuda.device(device):
        has_descriptors = torch.cuda.get_device_capability(device)[0] >= 9
        launcher = make_launcher(_probe_kernel)
        compiled: dict[int, Any] = {}
        generator = torch.Generator(device).manual_seed(0)
        # The first two are of one kind, each other of a kind of its own.
        for case, (rows, number, multiple, wide, free, skip) in enumerate([
            (32, 2, 16, 2**41, 1, 0), (48, 2**31 - 1, 2**30, 2**62, 16, 16), (32, 3, 16, 2**41, 2**33, 0), (32, 3, 16, 2**41, 7, 1),
            (32, 16, 3, 2**41 + 16, 7, 0), (32, 1, 16, 2**41, 7, 0),
        ]):  # fmt: skip
            x = torch.randn(2, rows * _COLUMNS + 64, device=device, generator=generator).bfloat16()[:, skip:]
            source = torch.randn(rows - 1, _COLUMNS, device=device, generator=generator).bfloat16()
            blocks = Blocks(source, [rows - 1, _COLUMNS], [_COLUMNS, 1], (_ROWS, _COLUMNS), TensorDescriptor)
            arguments: dict[str, Any] = {
                "blocks": blocks if has_descriptors else source,
                "number": number, "one": 1, "multiple": multiple, "wide": wide, "free": free, "factor": 0.5,
                "ROWS": _ROWS, "COLUMNS": _COLUMNS, "DESCRIPTOR": has_descriptors,
            }  # fmt: skip
            grid, options = (rows // _ROWS, 1), {"num_warps": 4}
            launch = launcher.prepare(grid, options, {"out": 0, "x": 1, "blocks": 2}, out=x, x=x[0], **arguments)
            # The first of a kind goes to Triton, which compiles it.
            for given in (x[0], x[0], x[1]):
                got, expected = (torch.full((rows, _COLUMNS), torch.nan, device=device) for _ in range(2))
                launch(got, given, source)
                passed = arguments | {"blocks": blocks.passed() if has_descriptors else source}
                compiled[case] = _probe_kernel[grid](out=expected, x=given, **passed, **options, **COMPILER_OPTIONS)
                if not torch.equal(got, expected):
                    return "a launch by the CUDA driver gave another result than one by Triton"
        if None in launcher.compiled.values():
            return "compiled kernels are not as expected"
        if compiled[0] is not compiled[1] or len(launcher.compiled) != len(compiled) - 1:
            return "kernels are specialized on something else"
    return None


def problem_of_hopper_kernel(device: torch.device, attend: Callable[..., tuple[Tensor, Tensor]]) -> str | None:
    """What is wrong with the kernel for Hopper, or None: its error must be that of the plain kernel. Both are launched by ``attend``,
    :func:`cpattn.kernels.ragged_attention.ragged_attention`."""
    heads, kv_heads, dim, page_size = 4, 2, 128, 64
    num_queries, num_keys = 300, 450
    with torch.cuda.device(device):
        generator = torch.Generator(device).manual_seed(0)
        q, k, v = (
            torch.randn(n, h, dim, device=device, generator=generator).bfloat16()
            for n, h in ((num_queries, heads), (512, kv_heads), (512, kv_heads))
        )
        shape = tile_shapes(dim, dim, q.dtype, torch.cuda.get_device_capability(device), specialized=True)[0]
        spans = Spans.build(np.array([num_queries]), np.array([0]), np.array([num_keys]), np.array([num_keys - num_queries + 1]), device)
        # The pages lie in another order than their keys.
        table = torch.arange(len(k) // page_size - 1, -1, -1, dtype=torch.int32, device=device)[None]
        # Each is a power of two times a number of fp8, which bf16 has as well.
        k_scale, v_scale = (torch.full((kv_heads,), scale, device=device) for scale in (0.5, 2.0))
        k8, v8 = (x.to(torch.float8_e4m3fn) for x in (k, v))
        meant = k8.bfloat16() * 0.5, v8.bfloat16() * 2
        k_pages, v_pages, k8_pages, v8_pages = (_paged(x, page_size) for x in (k, v, k8, v8))
        for keys, (k_meant, v_meant), window in (
            (Keys(k, v), (k, v), None),
            (Keys(k_pages, v_pages, table), (k, v), 100),
            (Keys(k8_pages, v8_pages, table, k_scale, v_scale), meant, None),
        ):
            expected = _attention(q, k_meant[:num_keys], v_meant[:num_keys], dim**-0.5, window)
            options = AttentionOptions(dim**-0.5, window)
            fast, plain = (
                _error(attend(q, keys, spans, options, shapes=(each,))[0], expected) for each in (shape, shape._replace(specialized=False))
            )
            if not fast <= _SLACK * plain:
                return f"its error is {fast:.1e}, that of the plain kernel {plain:.1e}"
    return None


def _paged(x: Tensor, page_size: int) -> Tensor:
    """Keys in pages, the last page first."""
    return x.view(torch.uint8).view(-1, page_size, *x.shape[1:-1], x.shape[-1] * x.element_size()).flip(0).view(x.dtype)


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """In float64, the last query aligned to the last key."""
    k, v = (x.double().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * scale
    behind = torch.arange(len(k) - len(q), len(k), device=q.device)[:, None] - torch.arange(len(k), device=q.device)
    seen = (behind >= 0) if window is None else (behind >= 0) & (behind < window)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def _error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())
