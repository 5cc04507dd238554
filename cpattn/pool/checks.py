"""What a KVPool refuses of its arguments, before anything has changed."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cpattn.call.tensor_kinds import check_kind
from cpattn.errors import BatchError, CPError, PageTableError, RankError, shown
from cpattn.metadata.batch import MAX_TOKENS, is_integer
from cpattn.metadata.striped import Striped
from cpattn.stored import FP8, ScaleKind, is_fp8

# Every rank has all tokens, or those that it computed.
OWNERS = ("replicated", "computed")


def parse_size(name: str, value: Any, least: int = 1) -> int:
    """A number of the pool's sizes as a plain int. The limit is that of page numbers, which are int32 in a page table."""
    if not is_integer(value) or not least <= value <= MAX_TOKENS:
        raise CPError(f"{name}={shown(value)}; pass an integer from {least} to {MAX_TOKENS}")
    return int(value)


def parse_rank(cp_rank: Any, cp_size: int) -> int:
    if not is_integer(cp_rank) or not 0 <= cp_rank < cp_size:
        raise RankError(
            f"cp_rank={cp_rank!r}; pass this process's rank within the context-parallel group, an integer from 0 to {cp_size - 1} "
            f"(cp_size is {cp_size})"
        )
    return int(cp_rank)


def parse_owner(owner: Any, sharded: Any) -> str | Striped:
    """The owner rule of a pool; ``sharded`` is the older word for two of them, and None where it was not given."""
    if sharded is not None and not isinstance(sharded, bool):
        raise CPError(f"sharded={sharded!r} ({type(sharded).__name__}); pass True or False")
    if owner is None:
        return OWNERS[bool(sharded)]
    if sharded is not None:
        raise CPError(f"owner={shown(owner)} beside sharded={sharded}; the owner says whether the pool is sharded, so leave sharded out")
    if isinstance(owner, Striped):
        return owner
    if not isinstance(owner, str) or owner not in OWNERS:
        raise CPError(f"owner={shown(owner)}; pass {', '.join(map(repr, OWNERS))} or cpattn.Striped(interleave)")
    return OWNERS[OWNERS.index(owner)]


def check_dtype(dtype: Any) -> None:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise CPError(f"dtype={dtype!r}; pass the floating torch dtype of the model's keys and values, such as torch.bfloat16")


def parse_scales(scales: Any, dtype: torch.dtype) -> ScaleKind | None:
    """What a scale of a pool belongs to: a matter of fp8 pages."""
    if not is_fp8(dtype):
        if dtype.itemsize == 1:
            raise CPError(f"dtype={dtype}; of fp8 pages may be in {' and '.join(map(str, FP8))}")
        if scales is not None:
            raise CPError(f"scales={shown(scales)}, but dtype={dtype}; scales are for pages in fp8: leave it out")
        return None
    if scales == "head":
        return "head"
    if scales == "token":
        return "token"
    raise CPError(
        f"scales={shown(scales)} beside dtype={dtype}; pass 'token' for a scale that each token and head gets as it is written, or 'head' "
        "for one a layer and KV head, which you set"
    )


def check_holds_data(device: torch.device) -> None:
    if device.type == "meta":
        raise CPError("device='meta' holds no data, and pages are to hold keys and values; pass 'cpu' or a CUDA device")


def make_pages(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros ``[num_layers, num_pages, page_size, kv_heads, head_dim]``. What does not fit is refused with its size, which torch
    does not always say."""
    try:
        return torch.zeros(*shape, dtype=dtype, device=device)
    except (RuntimeError, MemoryError) as error:
        layers, pages, page_size, heads, head_dim = shape
        why = str(error).partition("\n")[0].rstrip(". ")
        raise CPError(
            f"{pages} pages of {page_size} tokens in {layers} layers, {heads} heads of {head_dim} each in {dtype}, are "
            f"{math.prod(shape) * dtype.itemsize} bytes, which cannot be had on {device} ({why}); they are made at once, "
            "for K and for V: give fewer num_pages"
        ) from error


def check_name(request: Any) -> None:
    try:
        hash(request)
    except TypeError:
        raise CPError(
            f"request {request!r} is a {type(request).__name__}, which has no hash; name requests by strings, integers or tuples of these"
        ) from None


def parse_extends(extends: Any) -> list[tuple[Hashable, int]]:
    """The requests of a step with their counts of new tokens, as plain ints."""
    rule = "pass (request, new tokens) pairs, such as [('a', 512), ('b', 1)]"
    if isinstance(extends, Mapping):
        raise BatchError(f"the step is a {type(extends).__name__}; {rule}: list(step.items())")
    pairs = []
    for place, pair in enumerate(_in_order("the step", extends, rule)):
        if not isinstance(pair, Sequence) or isinstance(pair, _TEXT) or len(pair) != 2:
            raise BatchError(f"entry {place} of the step is {pair!r}, which is not a pair; {rule}")
        name, count = pair
        check_name(name)
        if not is_integer(count) or count < 0:
            raise BatchError(f"request {name!r} gets {shown(count)} new tokens ({type(count).__name__}); pass an integer of at least 0")
        if count > MAX_TOKENS:
            raise BatchError(f"request {name!r} gets {count} new tokens; the limit is {MAX_TOKENS} (row numbers are int32): give fewer")
        pairs.append((name, int(count)))
    return pairs


def parse_names(requests: Any) -> list[Hashable]:
    names = _in_order("requests", requests, "pass a sequence of names in the order of the plan, such as ['a', 'b']")
    for name in names:
        check_name(name)
    return names


def parse_length(length: Any, request: Hashable, cached: int) -> int:
    """How many of a request's first tokens are meant, out of those in the cache."""
    if not is_integer(length) or not 0 <= length <= cached:
        raise CPError(f"request {request!r} has {cached} tokens in the cache, but length={length!r}; pass an integer from 0 to {cached}")
    return int(length)


def parse_shape(shape: Any, lines: int, width: int) -> tuple[int, int]:
    """The shape of a page table that has room for so many requests and pages."""
    pair = isinstance(shape, Sequence) and not isinstance(shape, _TEXT) and len(shape) == 2
    if not pair or not all(is_integer(size) and size >= 1 for size in shape):
        raise CPError(f"shape={shape!r}; pass a pair of integers of at least 1, (requests, pages of each), or None")
    if shape[0] < lines or shape[1] < width:
        raise CPError(
            f"a page table of {tuple(shape)} is too small for {lines} requests of up to {width} pages; choose a larger bucket, with a "
            "shape of at least these"
        )
    return int(shape[0]), int(shape[1])


def check_layer(layer: Any, num_layers: int, page_table: Any) -> None:
    if not is_integer(layer) or not 0 <= layer < num_layers:
        raise CPError(f"layer={shown(layer)}, but the pool has {num_layers} layers; pass an integer from 0 to {num_layers - 1}")
    check_kind("page_table", page_table)
    if not isinstance(page_table, Tensor) or page_table.ndim != 2 or page_table.dtype not in (torch.int32, torch.int64):
        what = f"is {tuple(page_table.shape)} {page_table.dtype}" if isinstance(page_table, Tensor) else f"is a {type(page_table).__name__}"
        raise PageTableError(
            f"page_table {what}; pass what pool.page_table returned, an int32 or int64 tensor [requests, max_pages], made once a step"
        )


_TEXT = (str, bytes, bytearray)


def _in_order(what: str, values: Any, rule: str) -> list[Any]:
    """The values as a list. Text would be taken letter by letter, and a set has another order on every rank."""
    if isinstance(values, (*_TEXT, set, frozenset)) or not isinstance(values, Iterable):
        raise BatchError(f"{what} is {values!r} ({type(values).__name__}); {rule}")
    return list(values)
