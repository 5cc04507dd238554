"""Compiles the kernels that move messages between GPUs for a Hopper GPU, which need not be there; prints each one's name.

It runs without Triton's interpreter, in a process of its own.
"""

from __future__ import annotations

import re
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from cpattn.kernels import peer_exchange, peer_rows

HOPPER = GPUTarget("cuda", 90, 32)
TABLE = {"table": "*i64"}
WIDTHS = {"HEADS": 8, "D": 128, "DV": 128, "D_PADDED": 128, "DV_PADDED": 128, "BLOCK_R": 64}
ORDER = {"out": "*i64", "index": "*i64", "slots": "*i64", **TABLE}
LATE = {"own_rows": "*i32", "places": "*i32", "flags": "*i32", "like": "*i64", "source": "*i32", "order": "*i32"}
PAGES = {"k_pages": "*bf16", "v_pages": "*bf16", "page_table": "*i32", "request": "*i64", "position": "*i64", **TABLE}
WORDS = {"UNIT": 2, "BLOCK_W": 4096}


def compile_it(kernel: Any, pointers: dict[str, str], constants: dict[str, Any], warps: int, *, is_wide: bool = False) -> None:
    """``is_wide``: whether it should move 16 bytes at once."""
    names = [parameter.name for parameter in kernel.params]
    constants = constants | {"WORLD": 3, "THREADS": 32 * warps}
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if pointers.get(name, "").startswith("*")}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, aligned)
    text = compile(source, target=HOPPER, options={"num_warps": warps}).asm["ptx"]
    for access in ("ld", "st") if is_wide else ():
        assert re.search(access + r"\.global[^;]*\.v(4\.b32|2\.b64)", text), f"{kernel.__name__} has no {access} of 16 bytes"
    print(kernel.__name__)


if __name__ == "__main__":
    compile_it(peer_rows.await_readers_kernel, TABLE, {"FIRST": True, "FLAGS": 128}, 1)
    compile_it(peer_rows.await_messages_kernel, TABLE, {}, 1)
    given = TABLE | {"k": "*bf16", "v": "*bf16", "num_tokens": "*i32"}
    compile_it(peer_rows.post_rows_kernel, given, WIDTHS | {"COUNT_ON_DEVICE": True}, 4)
    pieces = {"WIDTH": 512, "UNIT": 2, "PIECE": 16, "BLOCK_W": 512, "TOGETHER": 4, "FLAGS": 1024, "SHARES": False}
    late = TABLE | LATE | {"k": "*bf16", "v": "*bf16"}
    for posts, pulls in ((True, True), (True, False), (False, True)):
        parts = WIDTHS | pieces | {"POSTS": posts, "PULLS": pulls}
        compile_it(peer_exchange.exchange_rows_kernel, late, parts, 32, is_wide=pulls)
    order = {"WIDTH": 512, "UNIT": 2, "BLOCK_R": 4, "BLOCK_W": 512, "SLOTS": True}
    compile_it(peer_rows.pull_rows_kernel, ORDER, order, 8, is_wide=True)
    compile_it(peer_rows.pull_pages_kernel, PAGES, WIDTHS | {"TABLE": True, "ENDS": False}, 8)
    u8 = PAGES | {"k_pages": "*u8", "v_pages": "*u8"}
    compile_it(peer_rows.pull_pages_kernel, u8, WIDTHS | {"TABLE": True, "ENDS": True}, 8)
    compile_it(peer_rows.post_words_kernel, TABLE | {"x": "*i64"}, WORDS, 8, is_wide=True)
    compile_it(peer_rows.pull_words_kernel, TABLE | {"out": "*i64"}, WORDS, 8, is_wide=True)
    compile_it(peer_rows.end_copy_kernel, TABLE | {"out": "*i64"}, {"BLOCK_W": 1024}, 1)
