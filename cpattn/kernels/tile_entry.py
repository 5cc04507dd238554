"""What ``cpattn tune`` finds, and for what: the rules for it, and its form in JSON."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch

from cpattn.errors import CPError
from cpattn.kernels.tile_shapes import WIDE, TileShape
from cpattn.version import __version__

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# A warp's share of a product has at least 16 rows; with fewer, its keys are split over the warps.
_WARP_ROWS = 16
_SPECIALIZED_ROWS = (128, 64)
_LARGEST_BLOCK = 512
_T = TypeVar("_T")


class TileKey(NamedTuple):
    """What shapes are tuned for. Kernels change from release to release, so that shapes hold for one of cpattn only.

    Attributes:
        capability: of the GPU.
        head_dim, v_head_dim, dtype, specialized, v_in_k: as :func:`cpattn.kernels.tile_shapes.tile_shapes` takes them.
        triton: its version, as "3.6".
        cpattn: its version.
    """

    capability: tuple[int, int]
    head_dim: int
    v_head_dim: int
    dtype: torch.dtype
    specialized: bool
    v_in_k: bool
    triton: str
    cpattn: str = __version__


class TileEntry(NamedTuple):
    """What was found for a key.

    Attributes:
        shapes: the largest ``block_m`` first.
        device, torch, date: on what, with what and when it was measured.
        gain: by how much it was faster than the default shapes: 0.05 is 5%.
    """

    shapes: tuple[TileShape, ...]
    device: str
    torch: str
    date: str
    gain: float


def why_not_shapes(shapes: Sequence[TileShape], key: TileKey) -> str | None:
    """Why these can not be what a batch's shape is chosen from, or None. See :func:`cpattn.kernels.tile_shapes.tile_shapes`
    for the rules by which a query's bits do not depend on the batch."""
    half = key.dtype != torch.float32
    rows = [shape.block_m for shape in shapes]
    if not shapes or rows != sorted(set(rows), reverse=True):
        return f"block_m of {rows}: there must be at least one shape, each with fewer rows than the one before"
    if len({shape.block_n for shape in shapes}) > 1:
        return f"block_n of {[shape.block_n for shape in shapes]}: all shapes must have the same"
    for shape in shapes:
        if half and shape.block_m < 64:
            return f"block_m={shape.block_m}: in half precision it must be at least 64"
        for name, least, most in (("block_m", 16, _LARGEST_BLOCK), ("block_n", 16, _LARGEST_BLOCK), ("num_warps", 1, 16)):
            value = getattr(shape, name)
            if not least <= value <= most or value & (value - 1):
                return f"{name}={value}: it must be a power of two from {least} to {most}"
        if not 1 <= shape.num_stages <= 8:
            return f"num_stages={shape.num_stages}: it must be from 1 to 8"
        if len(shapes) > 1 and (not half or shape.num_warps * _WARP_ROWS > shape.block_m):
            return (
                f"num_warps={shape.num_warps} for block_m={shape.block_m}: where there are several shapes, a warp must have "
                f"{_WARP_ROWS} rows, in half precision"
            )
        if shape.tma and key.capability < (9, 0):
            return f"tma on compute capability {dotted(key.capability)}: it needs 9.0"
        if shape.specialized and not (key.specialized and shape.tma and shape.block_m in _SPECIALIZED_ROWS):
            return "specialized: that kernel needs a Triton that has it, tma, and tiles of 128 or 64 rows"
        if shape.specialized and max(key.head_dim, key.v_head_dim) > WIDE:
            return f"specialized: that kernel has head dims up to {WIDE}"
    return None


_KEY_FIELDS = {"head_dim": int, "v_head_dim": int, "specialized": bool, "v_in_k": bool, "triton": str, "cpattn": str}
_ENTRY_FIELDS = {"device": str, "torch": str, "date": str}
_SHAPE_FIELDS = {"block_m": int, "block_n": int, "num_warps": int, "num_stages": int, "tma": bool, "specialized": bool}


def entry_from_json(content: Any) -> tuple[TileKey, TileEntry]:
    """Raises CPError for anything that :func:`entry_to_json` could not have made, unknown fields included."""
    fields = json_object(content, ("capability", "dtype", *_KEY_FIELDS, "shapes", *_ENTRY_FIELDS, "gain"), "it")
    capability = re.fullmatch(r"(\d+)\.(\d+)", typed(fields["capability"], str, "capability"))
    if capability is None:
        raise CPError(f"capability {fields['capability']!r}: it must be such as '9.0'")
    dtype = _DTYPES.get(typed(fields["dtype"], str, "dtype"))
    if dtype is None:
        raise CPError(f"dtype {fields['dtype']!r}: it must be one of {', '.join(_DTYPES)}")
    key_fields: dict[str, Any] = {name: typed(fields[name], kind, name) for name, kind in _KEY_FIELDS.items()}
    key = TileKey(capability=(int(capability[1]), int(capability[2])), dtype=dtype, **key_fields)
    shapes = []
    for found in typed(fields["shapes"], list, "shapes"):
        shape = json_object(found, tuple(_SHAPE_FIELDS), "a shape")
        values: dict[str, Any] = {name: typed(shape[name], kind, name) for name, kind in _SHAPE_FIELDS.items()}
        shapes.append(TileShape(**values))
    reason = why_not_shapes(shapes, key)
    if reason:
        raise CPError(reason)
    if type(fields["gain"]) not in (int, float):
        raise CPError(f"gain is {fields['gain']!r}, not a number")
    about: dict[str, Any] = {name: typed(fields[name], kind, name) for name, kind in _ENTRY_FIELDS.items()}
    return key, TileEntry(shapes=tuple(shapes), gain=float(fields["gain"]), **about)


def entry_to_json(key: TileKey, entry: TileEntry) -> dict[str, Any]:
    """Key and entry as one object of JSON's own types."""
    names = {"capability": dotted(key.capability), "dtype": str(key.dtype).removeprefix("torch.")}
    return key._asdict() | names | entry._asdict() | {"shapes": [shape._asdict() for shape in entry.shapes]}


def dotted(capability: tuple[int, int]) -> str:
    """
    >>> dotted((9, 0))
    '9.0'
    """
    return ".".join(map(str, capability))


def json_object(content: Any, names: tuple[str, ...], what: str) -> dict[str, Any]:
    """An object of JSON with exactly these names. Raises CPError."""
    if type(content) is not dict:
        raise CPError(f"{what} is {type(content).__name__}, not an object")
    missing, unknown = [name for name in names if name not in content], [name for name in content if name not in names]
    if missing or unknown:
        raise CPError(f"{what} lacks {', '.join(missing)}" if missing else f"{what} has {', '.join(map(repr, unknown))}, which is unknown")
    return content


def typed(value: Any, kind: type[_T], name: str) -> _T:
    """The value, which has exactly this type. Raises CPError."""
    # A bool is an int to isinstance.
    if type(value) is not kind:
        raise CPError(f"{name} is {value!r}, not of type {kind.__name__}")
    return value
