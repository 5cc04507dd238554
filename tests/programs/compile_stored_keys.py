"""Compiles what converts stored numbers, and attention over stored keys, for GPUs that need not be there; prints each one's name.

It runs without Triton's interpreter, in a process of its own, and fails where keys are not copied 16 bytes at a time, or 8 where they
lie so; where products are not of the dtype that they should be; or where each of them waits for the one before.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from cpattn.kernels.attention_config import HopperConfig, RaggedConfig
from cpattn.kernels.ragged_kernel import ragged_attention_kernel
from cpattn.kernels.stored_numbers import stored_rows_kernel

HOPPER, AMPERE = GPUTarget("cuda", 90, 32), GPUTarget("cuda", 80, 32)
FLOATS = ("tanh_scale", "exponent_scale")


def compile_it(
    kernel: Any, target: GPUTarget, pointers: dict[str, str], constants: dict[str, Any], source_type: Any = ASTSource,
    unaligned: tuple[str, ...] = (), **options: int,
) -> Any:  # fmt: skip
    names = [parameter.name for parameter in kernel.params]
    signature = {name: "constexpr" if name in constants else pointers.get(name, "fp32" if name in FLOATS else "i32") for name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if pointers.get(name, "").startswith("*") or (name.endswith(("stride_row", "stride_head", "page_stride")) and name not in unaligned)
    }
    source = source_type(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, aligned)
    compiled = compile(source, target=target, options=options)
    assert compiled.metadata.shared <= 227 * 1024, compiled.metadata.shared
    print(kernel.__name__, target.arch, f"{compiled.metadata.shared} bytes of shared memory")
    return compiled


def config(fp8: int, native: bool, of_tokens: bool, block_m: int) -> RaggedConfig:
    """As the wrapper has it for 32 heads, 8 of K and V, of 128, in pages of 64."""
    return RaggedConfig(
        NUM_HEADS=32, GROUP=4, PACK=4, D=128, DV=128, D_PADDED=128, DV_PADDED=128, BLOCK_N=64, Q_SIGN=1, WINDOW=False, SOFTCAP=False,
        SINKS=False, INTO=False, PAGE_SIZE=64, D_TAIL=0, D_TAIL_PADDED=0, BLOCK_M=block_m, TMA=False, V_IN_K=False, STORED=True, FP8=fp8,
        NATIVE=native, SCALED=fp8 > 0, OF_TOKENS=of_tokens,
    )  # fmt: skip


def compile_hopper(fp8: int, of_tokens: bool, dims: tuple[int, int], page_size: int, copied: int = 16, form: int = 0) -> Any:
    """The kernel for Hopper, as its wrapper has it for 32 heads, 8 of K and V, in one of its forms."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    from cpattn.kernels.hopper_kernel import hopper_attention_kernel
    from cpattn.kernels.tile_shapes import padded_dims, stored_blocks, stored_shapes

    stored = {0: torch.float16, 1: torch.float8_e4m3fn, 2: torch.float8_e5m2}[fp8]
    shape, padded = stored_shapes(*dims, torch.bfloat16, stored)[form], padded_dims(*dims)
    constants = HopperConfig(
        NUM_HEADS=32, GROUP=4, PACK=4, D=dims[0], DV=dims[1], D_PADDED=padded.d, DV_PADDED=padded.dv, BLOCK_N=shape.block_n, Q_SIGN=1,
        WINDOW=False, SOFTCAP=False, SINKS=False, INTO=False, PAGE_SIZE=page_size, STORED=True, FP8=fp8, SCALED=fp8 > 0,
        OF_TOKENS=of_tokens, STAGES=shape.key_blocks, Q_TMA=True, PAGE_KEYS=0, WAITS=False, ROOM=False, PREFIX=False, OWN=False,
        RAW=stored_blocks(*dims, stored), COPIED=copied, CONSUMERS=shape.warpgroups,
    )  # fmt: skip
    block = [16, 4, padded.d]
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)
    pointers = {"q": f"tensordesc<bf16{block},{layout!r}>", "q_pointer": "*bf16", "out": "*bf16"}
    pointers |= dict.fromkeys(("k", "v"), "*u8" if fp8 else "*fp16")
    pointers |= dict.fromkeys(("lse", "sinks", "k_scale", "v_scale"), "*fp32")
    unused = ("k_prefix", "v_prefix", "prefix_places", "k_own", "v_own", "own_places")
    pointers |= dict.fromkeys(("tiles", "limits", "counter", "arrived", "late", *unused), "*i32")
    # What is carried from one block to the next has to be of one type with that, too.
    pointers["page_table"] = "*i64"
    unaligned = () if copied == 16 else ("k_stride_head", "v_stride_head")
    return compile_it(hopper_attention_kernel, HOPPER, pointers, {"C": constants}, GluonASTSource, unaligned, num_warps=4)


def check_hopper(compiled: Any, copied: int, products: str) -> None:
    """That so many bytes are copied at a time, and of scales alone less; and that products are of this dtype, and overlap."""
    ptx = compiled.asm["ptx"]
    assert set(re.findall(r"wgmma\.mma_async\.\S*\.f32\.(\w+)\.", ptx)) == {products}
    copies = re.findall(r"cp\.async\.(c[ag])\.shared\.global[^;]*, (0x\w+)", ptx)
    assert {int(size, 16) for _, size in copies} - {4} == {copied}, copies
    check_loops(compiled)


def check_loops(compiled: Any) -> None:
    """That the assembler has not put a wait behind each product, as it does, with no more than a warning, where registers are too few; and
    that rows are multiplied by what they decay by, the two of a thread in turn, two numbers each, if one of a warp does."""
    sass = compiled.asm["sass"]
    assert 0 < 4 * sass.count("WARPGROUP.DEPBAR") <= sass.count("HGMMA"), (sass.count("WARPGROUP.DEPBAR"), sass.count("HGMMA"))
    parts = re.findall(r"\{ \.reg \.pred first.*?SAME: \}", compiled.asm["ptx"], re.DOTALL)
    assert parts
    for part in parts:
        assert "vote.sync.any.pred" in part
        rows = re.findall(r"setp\.neu\.f32 \w+, (%\w+), 0f3F800000", part)
        by = re.findall(r"mul\.f32 (%\w+), \1, (%\w+);", part)
        # As products have it: rows that are 8 apart.
        assert len(set(rows)) == 2
        assert len(by) == part.count("mul.f32") >= 32
        assert [row for _, row in by] == [rows[i // 2 % 2] for i in range(len(by))]


if __name__ == "__main__":
    check_hopper(compile_hopper(1, False, (64, 64), 64, form=1), 16, "f16")
    check_hopper(compile_hopper(1, True, (128, 128), 64), 16, "bf16")
    check_hopper(compile_hopper(0, False, (128, 128), 64), 16, "bf16")
    # Of a message with scales of tokens.
    check_hopper(compile_hopper(2, True, (192, 128), 0, copied=8), 8, "bf16")
    both = ("plain_k", "plain_v")
    rows = dict.fromkeys(both, "*bf16") | {"stored_k": "*u8", "stored_v": "*u8", "k_scale": "*fp32", "v_scale": "*fp32"}
    sizes = {"HEADS": 8, "D": 128, "DV": 128, "D_PADDED": 128, "DV_PADDED": 128, "BLOCK_R": 32}
    for fp8 in (1, 2):
        for scales in ({"SCALE": True, "NEW_SCALE": False}, {"SCALE": True, "NEW_SCALE": True}):
            compile_it(stored_rows_kernel, AMPERE, rows, sizes | scales | {"FP8": fp8, "NATIVE": False, "STORE": True}, num_warps=4)
        for target, native in ((HOPPER, True), (AMPERE, False)):
            reads = {"FP8": fp8, "NATIVE": native, "STORE": False, "SCALE": True, "NEW_SCALE": False}
            compile_it(stored_rows_kernel, target, rows, sizes | reads, num_warps=4)
    pointers = {
        "q": "*bf16",
        "k": "*u8",
        "v": "*u8",
        "out": "*bf16",
        "k_scale": "*fp32",
        "v_scale": "*fp32",
        "lse": "*fp32",
        "sinks": "*fp32",
    }
    pointers |= {"tiles": "*i32", "page_table": "*i32"}
    compile_it(ragged_attention_kernel, HOPPER, pointers, {"C": config(2, True, False, 64)}, num_warps=4, num_stages=3)
    compile_it(ragged_attention_kernel, AMPERE, pointers, {"C": config(1, False, True, 64)}, num_warps=4, num_stages=2)
    half = pointers | {"q": "*fp16", "k": "*bf16", "v": "*bf16", "out": "*fp16"}
    compile_it(ragged_attention_kernel, HOPPER, half, {"C": config(0, False, False, 64)}, num_warps=4, num_stages=3)
