"""Device code by which rows are read while others are still on their way: a kernel brings rows piece by piece, and the attention
beside it waits for each piece when it comes to it.

The rows are in memory of this GPU, in pieces of PIECE_ROWS. ``flags`` says what is there: its first word is the number of the
turn, its second one that number once all pieces are there, and then there is a word for each piece, with that number once it is.
So nothing has to be cleared from turn to turn; all words are 0 before the first one. ``late`` says which pieces are waited for: those
with a row that is brought.

The attention is launched as a dependent of the kernel that brings the rows (programmatic dependent launch), and so begins when
all programs of that know that what they bring is there for them. They wait for nothing any more, and end whatever else there is to
compute: nobody waits in vain.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl

from cpattn.kernels import arrival_layout

_FIRST_FLAG = tl.constexpr(arrival_layout.FIRST_FLAG)


@triton.jit
def let_next_begin():
    """Lets the next kernel of the stream begin, where it was launched as a dependent, once all programs have come here or ended."""
    tl.inline_asm_elementwise("griddepcontrol.launch_dependents; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def fence_for_copies():
    """Orders what each thread has written before copies by TMA, which are ordered apart from other reads."""
    thread = tl.arange(0, 32)
    tl.inline_asm_elementwise("fence.proxy.async; mov.u32 $0, $1;", "=r,r", [thread], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def announce(flags, turn, is_there):
    """Says by these flags, where ``is_there``, that what this program has written before is there, also to copies by TMA."""
    fence_for_copies()
    # All threads have written, and stand behind that fence, before one of them says so. In a loop with Triton's own barrier it would not
    # let loads of later turns begin.
    thread = tl.arange(0, 32)
    tl.inline_asm_elementwise("bar.sync 0; mov.u32 $0, $1;", "=r,r", [thread], dtype=tl.int32, is_pure=False, pack=1)
    tl.atomic_xchg(flags, turn, mask=is_there, sem="release", scope="gpu")


@triton.jit
def piece_flag(flags, piece):
    """That of a piece."""
    return flags + _FIRST_FLAG + piece


@triton.jit
def all_flag(flags):
    """That of all pieces."""
    return flags + 1
