"""What a kernel's wrapper has prepared serves one layout of its arguments: another in between is prepared for itself.

Each case calls A, then B, which differs from it in one property of the wrapper's key, then A again, with fresh data each
time. Launching what was prepared for the other gives wrong results where strides, counts or constants differ. In the
interpreter, which looks at dtypes and addresses anew, those alone would not be noticed, so that preparations are counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias

import pytest
import torch
from inputs.ragged_inputs import make_rows
from torch import Tensor

import cpattn
from cpattn.attention import merge as merge_of_parts
from cpattn.attention.backend import AttentionOptions
from cpattn.attention.merge import torch_merge_all_
from cpattn.attention.reference import reference_attention
from cpattn.memo import Memo
from cpattn.moves import moves, torch_moves
from cpattn.testing import SoloCommunicator

pytest.importorskip("triton")
from cpattn.kernels import merge, ragged_attention
from cpattn.kernels.tile_shapes import TileShape
from cpattn.keys import Keys
from cpattn.moves import triton_moves

# In the interpreter alone a launch keeps all that was prepared for it: compiled ones are for tests/kernels/test_launch.py.
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="looks at what the interpreter is given")

# Every tensor is a view of a buffer of so many elements, which no wrong stride leaves.
_BUFFER = 8192


class Random(NamedTuple):
    """A tensor of this layout with random numbers in and beside it."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    offset: int = 0

    def make(self, generator: torch.Generator, device: str) -> Tensor:
        scale = 1 if self.dtype.is_floating_point else 100
        buffer = (torch.rand(_BUFFER, generator=generator) * scale).to(device, self.dtype)
        return buffer.as_strided(self.shape, self.stride, self.offset)


class Given(NamedTuple):
    """A tensor of these numbers, and zeros beside it."""

    values: list[Any]
    dtype: torch.dtype = torch.int32
    stride: tuple[int, ...] | None = None

    def make(self, generator: torch.Generator, device: str) -> Tensor:
        values = torch.tensor(self.values, dtype=self.dtype, device=device)
        buffer = torch.zeros(_BUFFER, dtype=self.dtype, device=device)
        x = buffer.as_strided(values.shape, self.stride or values.stride())
        return x.copy_(values)


Arguments: TypeAlias = "dict[str, Any]"
# What A changes of the base, and what B changes of A.
Case: TypeAlias = "tuple[Arguments, Arguments]"


def make(arguments: Arguments, seed: int, device: str) -> Arguments:
    generator = torch.Generator().manual_seed(seed)
    return {name: x.make(generator, device) if isinstance(x, Random | Given) else x for name, x in arguments.items()}


def same_memory(got: Arguments, want: Arguments, tolerance: float = 0.0) -> None:
    """All tensors, what lies beside them in their buffers included."""
    for name, x in got.items():
        if isinstance(x, Tensor):
            y = want[name]
            x, y = (y if y._base is None else y._base for y in (x, y))
            torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance, equal_nan=True)


def half(*layouts: Random) -> list[Random]:
    return [layout._replace(dtype=torch.float16) for layout in layouts]


def parametrize(base: Arguments, cases: dict[str, Case]) -> pytest.MarkDecorator:
    pairs = [(base | first, base | first | second) for first, second in cases.values()]
    return pytest.mark.parametrize(("a", "b"), pairs, ids=list(cases))


class Watch:
    """Counts what a wrapper prepares, which begins with nothing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: ModuleType, launcher: str, prepare: str) -> None:
        self.prepared = 0
        original = getattr(module, prepare)

        def counted(*args: Any) -> Any:
            self.prepared += 1
            return original(*args)

        monkeypatch.setattr(module, prepare, counted)
        monkeypatch.setattr(getattr(module, launcher), "prepared", Memo(16))

    def check(self, call: Callable[[Arguments, int], None], a: Arguments, b: Arguments) -> None:
        for seed, (arguments, prepared) in enumerate([(a, 1), (b, 2), (a, 2)]):
            call(arguments, seed)
            assert self.prepared == prepared


MESSAGE, K, V = Random((8, 2, 24), (64, 32, 1)), Random((6, 2, 8), (40, 16, 1)), Random((6, 2, 16), (80, 32, 1))
PACK: Arguments = {"message": MESSAGE, "k": K, "v": V, "num_tokens": 5, "slots": None}
SLOTS = Given([3, 0, 7, -1, 5, 2])
FEW_ROWS = Given([5, 1, 4, 2, 0, 3])
# Of so many rows as the count on the device says.
COUNTED: Arguments = {"num_tokens": Given([5]), "slots": SLOTS}
K_9, V_9 = K._replace(shape=(9, 2, 8)), V._replace(shape=(9, 2, 16))
PACK_CASES: dict[str, Case] = {
    "message rows": ({}, {"message": MESSAGE._replace(shape=(10, 2, 24))}),
    "message row stride": ({}, {"message": MESSAGE._replace(stride=(72, 32, 1))}),
    "message head stride": ({}, {"message": MESSAGE._replace(stride=(64, 28, 1))}),
    "dtype": ({}, dict(zip(("message", "k", "v"), half(MESSAGE, K, V), strict=True))),
    "heads": ({}, {"message": Random((8, 1, 24), (64, 32, 1)), "k": K._replace(shape=(6, 1, 8)), "v": V._replace(shape=(6, 1, 16))}),
    "head dims": ({}, {"k": K._replace(shape=(6, 2, 16)), "v": V._replace(shape=(6, 2, 8))}),
    "k rows": (COUNTED | {"v": V_9, "slots": Given([3, 0, 7, -1, 5, 2, 1, 6, 4])}, {"k": K_9, "num_tokens": Given([9])}),
    "k row stride": ({}, {"k": K._replace(stride=(48, 16, 1))}),
    "k head stride": ({}, {"k": K._replace(stride=(40, 12, 1))}),
    "v rows": ({}, {"v": V_9}),
    "v row stride": ({}, {"v": V._replace(stride=(88, 32, 1))}),
    "v head stride": ({}, {"v": V._replace(stride=(80, 36, 1))}),
    "v": ({"message": MESSAGE._replace(shape=(8, 2, 16)), "v": None}, {"v": K}),
    "number of tokens": ({}, {"num_tokens": 4}),
    "count on the device": ({}, {"num_tokens": Given([5])}),
    "dtype of the count": (COUNTED, {"num_tokens": Given([5], torch.int64)}),
    "slots": ({}, {"slots": SLOTS}),
    "number of slots": (COUNTED | {"k": K_9, "v": V_9}, {"slots": Given([3, 0, 7, -1, 5, 2, 1, 6]), "num_tokens": Given([8])}),
    "dtype of slots": ({"slots": SLOTS}, {"slots": SLOTS._replace(dtype=torch.int64)}),
    "rows": ({"slots": SLOTS}, {"slots": SLOTS, "rows": FEW_ROWS}),
    "dtype of rows": ({"slots": SLOTS, "rows": FEW_ROWS}, {"slots": SLOTS, "rows": FEW_ROWS._replace(dtype=torch.int64)}),
    "some of the rows": ({"slots": SLOTS, "rows": FEW_ROWS}, {"slots": SLOTS, "rows": Given([8, 1, 6, 2, 5, 7]), "k": K_9, "v": V_9}),
}


@parametrize(PACK, PACK_CASES)
def test_pack_kv(a: Arguments, b: Arguments, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def call(arguments: Arguments, seed: int) -> None:
        got, want = (make(arguments, seed, device) for _ in range(2))
        triton_moves.pack(**got)
        torch_moves.pack(**want)
        same_memory(got, want)

    Watch(monkeypatch, triton_moves, "_pack", "_prepare_pack").check(call, a, b)


OUT, SOURCE = Random((6, 3, 4), (64, 4, 1)), Random((9, 3, 4), (32, 4, 1))
INDEX = Given([8, 0, -1, 3, 3, 5])
GATHER: Arguments = {"out": OUT, "source": SOURCE, "index": INDEX, "slots": None}
OUT_8 = OUT._replace(shape=(8, 3, 4))
SLOTTED: Arguments = {"out": OUT_8, "slots": SLOTS}
# Neither begins at a multiple of 16 bytes, but both at words.
BYTES: Arguments = {"out": Random((6, 8), (64, 1), torch.uint8, 4), "source": Random((9, 8), (32, 1), torch.uint8, 4)}
ALIGNED: Arguments = {name: x._replace(offset=0) for name, x in BYTES.items()}
GATHER_CASES: dict[str, Case] = {
    "out rows": (SLOTTED, {"out": OUT._replace(shape=(10, 3, 4))}),
    "out row stride": ({}, {"out": OUT._replace(stride=(80, 4, 1))}),
    "out row stride of other alignment": ({}, {"out": OUT._replace(stride=(65, 4, 1))}),
    "out offset of half words": (BYTES, {"out": BYTES["out"]._replace(offset=6)}),
    "out offset of bytes": (BYTES, {"out": BYTES["out"]._replace(offset=5)}),
    "out alignment": (ALIGNED, {"out": BYTES["out"]}),
    "source rows": ({}, {"source": SOURCE._replace(shape=(10, 3, 4))}),
    "source row stride": ({}, {"source": SOURCE._replace(stride=(48, 4, 1))}),
    "source row stride of other alignment": ({}, {"source": SOURCE._replace(stride=(33, 4, 1))}),
    "source offset of half words": (BYTES, {"source": BYTES["source"]._replace(offset=6)}),
    "source offset of bytes": (BYTES, {"source": BYTES["source"]._replace(offset=5)}),
    "source alignment": (ALIGNED, {"source": BYTES["source"]}),
    "width": ({}, {"out": OUT._replace(shape=(6, 2, 4)), "source": SOURCE._replace(shape=(9, 2, 4))}),
    "dtype": ({}, dict(zip(("out", "source"), half(OUT, SOURCE), strict=True))),
    "index length": ({"slots": SLOTS, "out": OUT_8}, {"index": Given(INDEX.values[:5]), "slots": Given(SLOTS.values[:5])}),
    "dtype of the index": ({}, {"index": INDEX._replace(dtype=torch.int64)}),
    "slots": ({"out": OUT_8, "index": Given([8, 0, -1, 3, 3, 5, 1, 2])}, {"slots": Given([3, 0, 7, -1, 5, 2, 1, 6])}),
    "dtype of slots": (SLOTTED, {"slots": SLOTS._replace(dtype=torch.int64)}),
}


@parametrize(GATHER, GATHER_CASES)
def test_gather_rows(a: Arguments, b: Arguments, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def call(arguments: Arguments, seed: int) -> None:
        got, want = (make(arguments, seed, device) for _ in range(2))
        triton_moves.gather_rows(**got)
        torch_moves.gather_rows(**want)
        same_memory(got, want)

    Watch(monkeypatch, triton_moves, "_gather", "_prepare_gather").check(call, a, b)


ACC, ACC_LSE = Random((5, 2, 8), (40, 16, 1)), Random((5, 2), (7, 3))
PARTS, LSE = Random((3, 5, 2, 8), (256, 48, 16, 1)), Random((3, 5, 2), (32, 5, 2))
MERGE: Arguments = {"acc": ACC, "acc_lse": ACC_LSE, "out": PARTS, "lse": LSE}
MERGE_CASES: dict[str, Case] = {
    "rows": (
        {},
        {
            "acc": ACC._replace(shape=(7, 2, 8)),
            "acc_lse": ACC_LSE._replace(shape=(7, 2)),
            "out": PARTS._replace(shape=(3, 7, 2, 8)),
            "lse": LSE._replace(shape=(3, 7, 2)),
        },
    ),
    "head dim": ({}, {"acc": ACC._replace(shape=(5, 2, 12)), "out": PARTS._replace(shape=(3, 5, 2, 12))}),
    "parts": ({}, {"out": PARTS._replace(shape=(2, 5, 2, 8)), "lse": LSE._replace(shape=(2, 5, 2))}),
    "one part without an axis": (
        {"out": PARTS._replace(shape=(1, 5, 2, 8)), "lse": LSE._replace(shape=(1, 5, 2))},
        {"out": Random((5, 2, 8), (48, 16, 1)), "lse": Random((5, 2), (5, 2))},
    ),
    "acc row stride": ({}, {"acc": ACC._replace(stride=(48, 16, 1))}),
    "acc head stride": ({}, {"acc": ACC._replace(stride=(40, 20, 1))}),
    "acc_lse row stride": ({}, {"acc_lse": ACC_LSE._replace(stride=(8, 3))}),
    "acc_lse head stride": ({}, {"acc_lse": ACC_LSE._replace(stride=(7, 2))}),
    "out part stride": ({}, {"out": PARTS._replace(stride=(272, 48, 16, 1))}),
    "out row stride": ({}, {"out": PARTS._replace(stride=(256, 40, 16, 1))}),
    "out head stride": ({}, {"out": PARTS._replace(stride=(256, 48, 20, 1))}),
    "lse part stride": ({}, {"lse": LSE._replace(stride=(40, 5, 2))}),
    "lse row stride": ({}, {"lse": LSE._replace(stride=(32, 6, 2))}),
    "lse head stride": ({}, {"lse": LSE._replace(stride=(32, 5, 3))}),
    "out dtype": ({}, {"out": PARTS._replace(dtype=torch.float16)}),
    "lse dtype": ({}, {"lse": LSE._replace(dtype=torch.float16)}),
}


@parametrize(MERGE, MERGE_CASES)
def test_merge_all(a: Arguments, b: Arguments, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def call(arguments: Arguments, seed: int) -> None:
        got, want = (make(arguments, seed, device) for _ in range(2))
        merge.merge_all(**got)
        one = want["out"].ndim == 3
        torch_merge_all_(want["acc"], want["acc_lse"], *(want[name][None] if one else want[name] for name in ("out", "lse")))
        same_memory(got, want, 1e-5)

    Watch(monkeypatch, merge, "_merge", "_prepare").check(call, a, b)


K_PAGES, V_PAGES = Random((4, 4, 2, 8), (256, 48, 16, 1)), Random((4, 4, 2, 16), (320, 72, 32, 1))
K_ROWS, V_ROWS = Random((7, 2, 8), (40, 16, 1)), Random((7, 2, 16), (80, 32, 1))
TABLE, REQUEST, POSITION = Given([[2, 0], [3, 1]]), Given([0, 0, 1, 0, 1, 0]), Given([5, 0, 7, -1, 2, 3])
PAGES: Arguments = {
    "k_pages": K_PAGES, "v_pages": V_PAGES, "page_table": TABLE, "request": REQUEST, "position": POSITION, "k": K_ROWS, "v": V_ROWS,
}  # fmt: skip
PAGES_CASES: dict[str, Case] = {
    "page size": ({"position": Given([1, 0, 3, -1, 2, 3])}, {"k_pages": K_PAGES._replace(shape=(4, 2, 2, 8))}),
    "k page stride": ({}, {"k_pages": K_PAGES._replace(stride=(272, 48, 16, 1))}),
    "k page's token stride": ({}, {"k_pages": K_PAGES._replace(stride=(256, 40, 16, 1))}),
    "k page's head stride": ({}, {"k_pages": K_PAGES._replace(stride=(256, 48, 20, 1))}),
    "v page stride": ({}, {"v_pages": V_PAGES._replace(stride=(336, 72, 32, 1))}),
    "v page's token stride": ({}, {"v_pages": V_PAGES._replace(stride=(320, 64, 32, 1))}),
    "v page's head stride": ({}, {"v_pages": V_PAGES._replace(stride=(320, 72, 36, 1))}),
    "dtype": ({}, dict(zip(("k_pages", "v_pages", "k", "v"), half(K_PAGES, V_PAGES, K_ROWS, V_ROWS), strict=True))),
    "heads": (
        {},
        {
            "k_pages": K_PAGES._replace(shape=(4, 4, 1, 8)),
            "v_pages": V_PAGES._replace(shape=(4, 4, 1, 16)),
            "k": K_ROWS._replace(shape=(7, 1, 8)),
            "v": V_ROWS._replace(shape=(7, 1, 16)),
        },
    ),
    "k head dim": ({}, {"k_pages": K_PAGES._replace(shape=(4, 4, 2, 12)), "k": K_ROWS._replace(shape=(7, 2, 12))}),
    "v head dim": ({}, {"v_pages": V_PAGES._replace(shape=(4, 4, 2, 8)), "v": V_ROWS._replace(shape=(7, 2, 8))}),
    "k rows": ({}, {"k": K_ROWS._replace(shape=(9, 2, 8))}),
    "k row stride": ({}, {"k": K_ROWS._replace(stride=(48, 16, 1))}),
    "k head stride": ({}, {"k": K_ROWS._replace(stride=(40, 20, 1))}),
    "v row stride": ({}, {"v": V_ROWS._replace(stride=(96, 32, 1))}),
    "v head stride": ({}, {"v": V_ROWS._replace(stride=(80, 36, 1))}),
    "v": ({"v_pages": None, "v": None}, {"v_pages": K_PAGES, "v": K_ROWS}),
    "number of rows": ({}, {"request": Given(REQUEST.values[:5]), "position": Given(POSITION.values[:5])}),
    "dtype of positions": ({}, {"position": POSITION._replace(dtype=torch.int64)}),
    "page table": ({}, {"page_table": None, "position": Given([5, 0, 7, -1, 2, 15])}),
    "page table's request stride": ({}, {"page_table": TABLE._replace(stride=(4, 1))}),
    "page table's page stride": ({"page_table": TABLE._replace(stride=(5, 1))}, {"page_table": TABLE._replace(stride=(5, 2))}),
    "dtype of the page table": ({}, {"page_table": TABLE._replace(dtype=torch.int64)}),
    "dtype of requests": ({}, {"request": REQUEST._replace(dtype=torch.int64)}),
}
OUT_ROWS = Given([4, 6, 0, 2, 1, 5])
# Pages of another dtype than what they are read into, so that one dtype changes alone.
HALF_PAGES: Arguments = dict(zip(("k_pages", "v_pages", "k", "v"), half(K_PAGES, V_PAGES, K_ROWS, V_ROWS), strict=True))
BYTE_PAGES: Arguments = {"v_pages": None, "v": None, "k_pages": K_PAGES._replace(dtype=torch.uint8)}
READ_CASES: dict[str, Case] = {
    "k page dtype": ({"v_pages": None, "v": None}, {"k_pages": HALF_PAGES["k_pages"]}),
    "k dtype": (HALF_PAGES, {"k": K_ROWS}),
    "k of bytes": (BYTE_PAGES | {"k": K_ROWS._replace(dtype=torch.uint8)}, {"k": K_ROWS._replace(dtype=torch.int16)}),
    "v dtype": (HALF_PAGES, {"v": V_ROWS}),
    "out_rows": ({}, {"out_rows": OUT_ROWS}),
    "dtype of out_rows": ({"out_rows": OUT_ROWS}, {"out_rows": OUT_ROWS._replace(dtype=torch.int64)}),
}


def watch_pages(monkeypatch: pytest.MonkeyPatch, device: str) -> tuple[Watch, Callable[[Arguments, int], None]]:
    def call(arguments: Arguments, seed: int) -> None:
        got, want = (make(arguments, seed, device) for _ in range(2))
        name = "write_pages" if arguments["write"] else "read_pages"
        kernel, twin = getattr(triton_moves, name), getattr(torch_moves, name)
        kernel(**{name: x for name, x in got.items() if name != "write"})
        twin(**{name: x for name, x in want.items() if name != "write"})
        same_memory(got, want)

    return Watch(monkeypatch, triton_moves, "_pages", "_prepare_pages"), call


@parametrize(PAGES | {"write": True}, PAGES_CASES)
def test_write_pages(a: Arguments, b: Arguments, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    watch, call = watch_pages(monkeypatch, device)
    watch.check(call, a, b)


@parametrize(PAGES | {"write": False}, PAGES_CASES | READ_CASES | {"write": ({}, {"write": True})})
def test_read_pages(a: Arguments, b: Arguments, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    watch, call = watch_pages(monkeypatch, device)
    watch.check(call, a, b)


SHAPE = TileShape(16, 16, 4, 2)
Q, KEYS, VALUES = Random((6, 2, 16), (80, 32, 1)), Random((20, 2, 16), (80, 32, 1)), Random((20, 2, 16), (96, 32, 1))
ATTENTION: Arguments = {
    "q": Q, "k": KEYS, "v": VALUES, "acc": None, "lse": None, "page_table": None, "scale": 2.0, "window": None, "softcap": None,
    "sinks": None, "out_dtype": None, "shapes": (SHAPE,), "packs": (1,),
}  # fmt: skip
OLD, OLD_LSE = Random((6, 2, 16), (64, 24, 1)), Random((6, 2), (5, 2))
INTO: Arguments = {"acc": OLD, "lse": OLD_LSE}
TABLE_10 = Given([[3, 8, 1, 14, 5, 0, 9, 2, 11, 7], [4, 15, 6, 10, 12, 13, 5, 8, 0, 3]])
OVER_PAGES: Arguments = {
    "k": Random((16, 4, 2, 16), (160, 40, 20, 1)), "v": Random((16, 4, 2, 16), (192, 48, 24, 1)), "page_table": TABLE_10,
}  # fmt: skip
SINKS = Random((2,), (1,))
TMA: Arguments = {"shapes": (SHAPE._replace(tma=True),)}
ATTENTION_CASES: dict[str, Case] = {
    "q rows": ({}, {"q": Q._replace(shape=(8, 2, 16))}),
    "query heads": (
        INTO | {"k": KEYS._replace(shape=(20, 1, 16)), "v": VALUES._replace(shape=(20, 1, 16))},
        {"q": Q._replace(shape=(6, 1, 16)), "acc": OLD._replace(shape=(6, 1, 16)), "lse": OLD_LSE._replace(shape=(6, 1))},
    ),
    "q row stride": ({}, {"q": Q._replace(stride=(96, 32, 1))}),
    "q head stride": ({}, {"q": Q._replace(stride=(80, 20, 1))}),
    "q alignment": ({}, {"q": Q._replace(offset=1)}),
    "dtype": (INTO, dict(zip("qkv", half(Q, KEYS, VALUES), strict=True))),
    "head dim": ({}, {"q": Q._replace(shape=(6, 2, 8)), "k": KEYS._replace(shape=(20, 2, 8))}),
    "number of keys": (TMA, {"k": KEYS._replace(shape=(24, 2, 16)), "v": VALUES._replace(shape=(24, 2, 16))}),
    "KV heads": ({}, {"k": KEYS._replace(shape=(20, 1, 16)), "v": VALUES._replace(shape=(20, 1, 16))}),
    "v head dim": (INTO, {"v": VALUES._replace(shape=(20, 2, 8)), "acc": OLD._replace(shape=(6, 2, 8))}),
    "k row stride": ({}, {"k": KEYS._replace(stride=(96, 32, 1))}),
    "k head stride": ({}, {"k": KEYS._replace(stride=(80, 20, 1))}),
    "v row stride": ({}, {"v": VALUES._replace(stride=(80, 32, 1))}),
    "v head stride": ({}, {"v": VALUES._replace(stride=(96, 20, 1))}),
    "v in k": ({"v": "k"}, {"v": KEYS}),
    "k alignment": (TMA, {"k": KEYS._replace(offset=1)}),
    "v alignment": (TMA, {"v": VALUES._replace(offset=1)}),
    "out row stride": (INTO, {"acc": OLD._replace(stride=(80, 24, 1))}),
    "out head stride": (INTO, {"acc": OLD._replace(stride=(64, 32, 1))}),
    "out dtype": ({}, {"out_dtype": torch.float16}),
    "lse row stride": (INTO, {"lse": OLD_LSE._replace(stride=(6, 2))}),
    "lse head stride": (INTO, {"lse": OLD_LSE._replace(stride=(5, 3))}),
    "into": ({}, {"acc": Random((6, 2, 16), (32, 16, 1)), "lse": Random((6, 2), (2, 1))}),
    "scale": ({}, {"scale": 3.0}),
    "a window": ({}, {"window": 4}),
    "window": ({"window": 6}, {"window": 4}),
    "a softcap": ({}, {"softcap": 2.0}),
    "softcap": ({"softcap": 3.0}, {"softcap": 2.0}),
    "sinks": ({}, {"sinks": SINKS}),
    "dtype of sinks": ({"sinks": SINKS}, {"sinks": SINKS._replace(dtype=torch.float16)}),
    "pages": ({}, OVER_PAGES),
    "page size": (OVER_PAGES, {name: OVER_PAGES[name]._replace(shape=(16, 2, 2, 16)) for name in "kv"}),
    "k page stride": (OVER_PAGES, {"k": OVER_PAGES["k"]._replace(stride=(176, 40, 20, 1))}),
    "v page stride": (OVER_PAGES, {"v": OVER_PAGES["v"]._replace(stride=(208, 48, 24, 1))}),
    "page table's request stride": (OVER_PAGES, {"page_table": TABLE_10._replace(stride=(12, 1))}),
    "page table's page stride": (
        OVER_PAGES | {"page_table": TABLE_10._replace(stride=(24, 1))},
        {"page_table": TABLE_10._replace(stride=(24, 2))},
    ),
    "dtype of the page table": (OVER_PAGES, {"page_table": TABLE_10._replace(dtype=torch.int64)}),
    "shapes": ({}, {"shapes": (SHAPE._replace(block_m=32),)}),
    "packs": ({"k": KEYS._replace(shape=(20, 1, 16)), "v": VALUES._replace(shape=(20, 1, 16))}, {"packs": (2,)}),
}


@parametrize(ATTENTION, ATTENTION_CASES)
def test_ragged_attention(a: Arguments, b: Arguments, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All over the same spans, which keep the launches."""
    rows = make_rows([3, 2], [0, 0], [20, 9], [18, 8], device)
    rows.request[1] = rows.host.request[1] = 1

    def call(arguments: Arguments, seed: int) -> None:
        x = make(arguments, seed, device)
        q, k, v = x["q"], x["k"], x["v"]
        v = k if isinstance(v, str) else v
        options = AttentionOptions(x["scale"], x["window"], x["softcap"], x["sinks"])
        want, want_lse = reference_attention(q, Keys(k, v, x["page_table"]), rows, options, torch.float32)
        into = None if x["acc"] is None else (x["acc"], x["lse"])
        if into is not None:
            # With all that lies beside them.
            buffers = [y._base for y in into]
            wanted = [y.clone() for y in buffers]
            old, old_lse = (y.as_strided(z.shape, z.stride()) for y, z in zip(wanted, into, strict=True))
            torch_merge_all_(old, old_lse, want[None], want_lse[None])
        out, lse = ragged_attention.ragged_attention(
            q, Keys(k, v, x["page_table"]), rows, options, x["out_dtype"], into, shapes=x["shapes"], packs=x["packs"]
        )
        tolerance = 2e-3 if torch.float16 in (q.dtype, out.dtype) else 2e-5
        n = rows.num_queries
        pairs = [(out[:n].float(), want[:n]), (lse[:n], want_lse[:n])] if into is None else zip(buffers, wanted, strict=True)
        for got, expected in pairs:
            torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)

    Watch(monkeypatch, ragged_attention, "_attention", "_prepare").check(call, a, b)


WRAPPERS = {
    "pack": (triton_moves, "_pack", "_prepare_pack"),
    "gather": (triton_moves, "_gather", "_prepare_gather"),
    "merge": (merge, "_merge", "_prepare"),
    "pages": (triton_moves, "_pages", "_prepare_pages"),
    "attention": (ragged_attention, "_attention", "_prepare"),
}


@pytest.mark.parametrize(
    ("strategy", "cache", "used"),
    [
        ("all_gather", "packed", {"pack", "gather", "attention"}),
        ("ring", "paged", {"pack", "pages", "merge", "attention"}),
    ],
)
def test_a_second_layer_prepares_nothing(
    strategy: str, cache: str, used: set[str], device: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(moves, "has_kernels", lambda device: True)
    monkeypatch.setattr("cpattn.attention.merge.has_kernels", lambda device: True)
    # What is chosen once a device is chosen anew, here and after the test.
    for choice in (moves.moves_for, merge_of_parts.merge_for):
        choice.cache_clear()
        request.addfinalizer(choice.cache_clear)
    # Without its own way of merging, so that results of several steps go through that kernel, too.
    backend = replace(cpattn.BACKENDS["triton"], device_types=None, refuses=lambda call: None, accumulate=None)
    watches = {name: Watch(monkeypatch, *wrapper) for name, wrapper in WRAPPERS.items()}
    plan = cpattn.plan([(5, 6), (0, 3)], 2)
    shared, group = plan.metadata(0, device), SoloCommunicator(0, 2)
    table = torch.tensor([[1, 0, 2], [3, 0, 0]], dtype=torch.int32, device=device)

    def layer(seed: int, meta: cpattn.CPMetadata, group: SoloCommunicator, q_heads: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device)

        # Of more heads the first two, which changes q's strides alone.
        q, (k, v) = random(meta.rows, q_heads, 16)[:, :2], random(2, meta.rows, 1, 16)
        kv_cache: cpattn.PackedKV | cpattn.PagedKV = cpattn.PackedKV(*random(2, 5, 1, 16))
        if cache == "paged":
            k_pages, v_pages = random(2, 5, 4, 1, 16)
            kv_cache = cpattn.PagedKV(k_pages, v_pages, table)
        return cpattn.cp_attention(q, k, v, meta, group=group, kv_cache=kv_cache, strategy=strategy, backend=backend, return_lse=True)

    for seed, (q_heads, expected) in enumerate([(2, used), (2, set()), (3, {"attention"}), (2, set())]):
        before = {name: watch.prepared for name, watch in watches.items()}
        got = layer(seed, shared, group, q_heads)
        assert {name for name, watch in watches.items() if watch.prepared > before[name]} == expected
        want = layer(seed, plan.metadata(0, device), SoloCommunicator(0, 2), q_heads)
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
