"""Compiles what converts stored numbers, and attention over stored keys, for GPUs that need not be there; prints each one's name.

It runs without Triton's interpreter, in a process of its own.
"""

from __future__ import annotations

from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from cpattn.kernels.attention_config import RaggedConfig
from cpattn.kernels.ragged_kernel import ragged_attention_kernel
from cpattn.kernels.stored_numbers import stored_rows_kernel

HOPPER, AMPERE = GPUTarget("cuda", 90, 32), GPUTarget("cuda", 80, 32)
FLOATS = ("tanh_scale", "exponent_scale")


def compile_it(kernel: Any, target: GPUTarget, pointers: dict[str, str], constants: dict[str, Any], **options: int) -> str:
    names = [parameter.name for parameter in kernel.params]
    signature = {name: "constexpr" if name in constants else pointers.get(name, "fp32" if name in FLOATS else "i32") for name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if pointers.get(name, "").startswith("*") or name.endswith(("stride_row", "stride_head", "page_stride"))
    }
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, aligned)
    compiled = compile(source, target=target, options=options)
    print(kernel.__name__, target.arch, f"{compiled.metadata.shared} bytes of shared memory")
    return str(compiled.asm["ptx"])


def config(fp8: int, native: bool, of_tokens: bool, block_m: int) -> RaggedConfig:
    """As the wrapper has it for 32 heads, 8 of K and V, of 128, in pages of 64."""
    return RaggedConfig(
        NUM_HEADS=32, GROUP=4, PACK=4, D=128, DV=128, D_PADDED=128, DV_PADDED=128, BLOCK_N=64, Q_SIGN=1, WINDOW=False, SOFTCAP=False,
        SINKS=False, INTO=False, PAGE_SIZE=64, D_TAIL=0, D_TAIL_PADDED=0, BLOCK_M=block_m, TMA=False, V_IN_K=False, STORED=True, FP8=fp8,
        NATIVE=native, SCALED=fp8 > 0, OF_TOKENS=of_tokens,
    )  # fmt: skip


if __name__ == "__main__":
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
    for fp8 in (1, 2):
        for block_m, stages in ((128, 2), (64, 3)):
            compile_it(
                ragged_attention_kernel, HOPPER, pointers, {"C": config(fp8, True, fp8 == 1, block_m)}, num_warps=4, num_stages=stages
            )
    compile_it(ragged_attention_kernel, AMPERE, pointers, {"C": config(1, False, True, 64)}, num_warps=4, num_stages=2)
    half = pointers | {"q": "*fp16", "k": "*bf16", "v": "*bf16", "out": "*fp16"}
    compile_it(ragged_attention_kernel, HOPPER, half, {"C": config(0, False, False, 64)}, num_warps=4, num_stages=3)
