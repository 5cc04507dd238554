"""Compiles the kernels that move messages between GPUs, and the attention beside one of them, for a Hopper GPU, which need not be there;
prints each one's name.

It runs without Triton's interpreter, in a process of its own.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from triton.compiler import ASTSource, compile

from cpattn.kernels import peer_exchange, peer_rows
from cpattn.kernels.arrival_layout import PIECE_ROWS
from cpattn.kernels.attention_config import REGISTERS_WITH_ROOM, HopperConfig
from cpattn.moves.peer_exchange import LONG, SHORT
from programs import compile_stored_keys
from programs.compile_stored_keys import HOPPER

TABLE = {"table": "*i64"}
WIDTHS = {"HEADS": 8, "D": 128, "DV": 128, "D_PADDED": 128, "DV_PADDED": 128, "BLOCK_R": 64}
ORDER = {"out": "*i64", "index": "*i64", "slots": "*i64", **TABLE}
LATE = {"own_rows": "*i32", "places": "*i32", "flags": "*i32", "like": "*i64", "source": "*i32", "order": "*i32"}
PAGES = {"k_pages": "*bf16", "v_pages": "*bf16", "page_table": "*i32", "request": "*i64", "position": "*i64", **TABLE}
WORDS = {"UNIT": 2, "BLOCK_W": 4096}


def compile_it(
    kernel: Any, pointers: dict[str, str], constants: dict[str, Any], warps: int, *, is_wide: bool = False, registers: int | None = None
) -> Any:
    """``is_wide``: whether it should move 16 bytes at once."""
    names = [parameter.name for parameter in kernel.params]
    constants = constants | {"WORLD": 3, "THREADS": 32 * warps}
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if pointers.get(name, "").startswith("*")}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, aligned)
    compiled = compile(source, target=HOPPER, options={"num_warps": warps, "maxnreg": registers})
    assert compiled.metadata.shared <= 227 * 1024, compiled.metadata.shared
    # Loads that later turns of a loop need are copies to shared memory.
    loads = r"cp\.async\.cg[^;]*, 0x10" if constants.get("STAGES", 1) > 1 else r"ld\.global[^;]*\.v(4\.b32|2\.b64)"
    for pattern in (loads, r"st\.global[^;]*\.v(4\.b32|2\.b64)") if is_wide else ():
        assert re.search(pattern, compiled.asm["ptx"]), f"{kernel.__name__} has no {pattern}"
    print(kernel.__name__)
    return compiled


def compile_attention(leaves_room: bool) -> Any:
    """For 32 heads, 8 of K and V, of 128."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    from cpattn.kernels.hopper_attention import key_blocks
    from cpattn.kernels.hopper_kernel import hopper_attention_kernel
    from cpattn.kernels.tile_shapes import tile_shapes

    shape = tile_shapes(128, 128, torch.bfloat16, (9, 0), specialized=True)[0]
    config = HopperConfig(
        NUM_HEADS=32, GROUP=4, PACK=1, D=128, DV=128, D_PADDED=128, DV_PADDED=128, BLOCK_N=128, Q_SIGN=1, WINDOW=False, SOFTCAP=False,
        SINKS=False, INTO=False, PAGE_SIZE=0, STORED=False, FP8=0, SCALED=False, OF_TOKENS=False,
        STAGES=key_blocks(shape, leaves_room), Q_TMA=True, PAGE_KEYS=0, WAITS=True, ROOM=leaves_room,
        PREFIX=False, OWN=False, RAW=0, COPIED=0, CONSUMERS=2,
    )  # fmt: skip

    def blocks(shape: list[int]) -> str:
        return f"tensordesc<bf16{shape},{gl.NVMMASharedLayout.get_default_for(shape, gl.bfloat16)!r}>"

    pointers = {"q": blocks([64, 1, 128]), "k": blocks([1, 128, 128]), "v": blocks([1, 128, 128]), "q_pointer": "*bf16", "out": "*bf16"}
    pointers |= dict.fromkeys(("lse", "sinks", "k_scale", "v_scale"), "*fp32")
    unused = ("k_prefix", "v_prefix", "prefix_places", "k_own", "v_own", "own_places", "page_table")
    pointers |= dict.fromkeys(("tiles", "limits", "counter", "arrived", "late", *unused), "*i32")
    options = {"num_warps": 4} | ({"maxnreg": REGISTERS_WITH_ROOM} if leaves_room else {})
    compiled = compile_stored_keys.compile_it(hopper_attention_kernel, HOPPER, pointers, {"C": config}, GluonASTSource, (), **options)
    compile_stored_keys.check_loops(compiled)
    return compiled


def check_they_fit(*programs: Any) -> None:
    """That a multiprocessor has room for them side by side: registers in each of its four quarters, which share a program's warps of 32
    threads, and shared memory, of which each takes 1 KiB beside its own."""
    registers = 0
    for program in programs:
        threads, of_each = (int(re.search(rf"\.{word} (\d+)", program.asm["ptx"])[1]) for word in ("reqntid", "maxnreg"))  # type: ignore[index]
        registers += threads // 4 * of_each
    assert registers <= 65536 // 4, registers
    shared = sum(program.metadata.shared + 1024 for program in programs)
    assert shared <= 228 * 1024, shared


if __name__ == "__main__":
    compile_it(peer_rows.await_readers_kernel, TABLE, {"FIRST": True, "FLAGS": 128}, 1)
    compile_it(peer_rows.await_messages_kernel, TABLE, {}, 1)
    given = TABLE | {"k": "*bf16", "v": "*bf16", "num_tokens": "*i32"}
    compile_it(peer_rows.post_rows_kernel, given, WIDTHS | {"COUNT_ON_DEVICE": True}, 4)
    pieces = {"WIDTH": 512, "UNIT": 2, "PIECE": PIECE_ROWS, "FLAGS": 1024, "SHARES": False, **LONG.blocks(512)}
    late = TABLE | LATE | {"k": "*bf16", "v": "*bf16"}
    # Rows of 16 bytes as well.
    for posts, pulls, width in ((True, True, 512), (True, False, 512), (False, True, 512), (False, True, 2)):
        parts = WIDTHS | pieces | {"POSTS": posts, "PULLS": pulls, "WIDTH": width, **LONG.blocks(width)}
        compile_it(peer_exchange.exchange_rows_kernel, late, parts, 32, is_wide=pulls and width == 512)
    how = SHORT
    short = {"BLOCK_R": how.post_bytes // 256, "FLAGS": 32 * how.warps, **how.blocks(512)}
    both = WIDTHS | pieces | {"POSTS": True, "PULLS": True} | short
    beside = compile_it(peer_exchange.exchange_rows_kernel, late, both, how.warps, is_wide=True, registers=how.registers)
    check_they_fit(beside, compile_attention(leaves_room=True))
    compile_attention(leaves_room=False)
    order = {"WIDTH": 512, "UNIT": 2, "BLOCK_R": 4, "BLOCK_W": 512, "SLOTS": True}
    compile_it(peer_rows.pull_rows_kernel, ORDER, order, 8, is_wide=True)
    compile_it(peer_rows.pull_pages_kernel, PAGES, WIDTHS | {"TABLE": True, "ENDS": False}, 8)
    u8 = PAGES | {"k_pages": "*u8", "v_pages": "*u8"}
    compile_it(peer_rows.pull_pages_kernel, u8, WIDTHS | {"TABLE": True, "ENDS": True}, 8)
    compile_it(peer_rows.post_words_kernel, TABLE | {"x": "*i64"}, WORDS, 8, is_wide=True)
    compile_it(peer_rows.pull_words_kernel, TABLE | {"out": "*i64"}, WORDS, 8, is_wide=True)
    compile_it(peer_rows.end_copy_kernel, TABLE | {"out": "*i64"}, {"BLOCK_W": 1024}, 1)
