"""Whether shapes that are fast are right as well: their error, and that a query's bits do not depend on how its batch is cut."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cpattn.attention.backend import AttentionOptions
from cpattn.attention.reference import reference_attention
from cpattn.attention.rows import RaggedRows
from cpattn.cli.tune.batches import random_tensors, rows_of
from cpattn.cli.tune.choice import in_one_line
from cpattn.cli.tune.target import Target
from cpattn.cli.tune.timing import wait
from cpattn.kernels.tile_candidates import ShapeSet
from cpattn.kernels.tile_shapes import packs_for, tile_shapes
from cpattn.testing import relative_rmse, rmse_bound

_BATCH = np.array([(300, 130), (0, 200), (777, 1), (64, 33)])
# With the first the specialized kernel reads pages; with the second none does that copies whole blocks.
_PAGE_SIZES = (16, 3)
_WINDOW, _SOFTCAP = 200, 30.0
# Scores of normal q and k, scaled, seldom are larger.
_SCORE_SIZE = 3.0


class _Keys(NamedTuple):
    """One way in which the same keys may lie."""

    where: str
    k: Tensor
    v: Tensor
    rows: RaggedRows


class Exactness:
    """The check for one target, on a small batch.

    Calls with a window, softcap, sinks, an earlier result or pages are compiled from the same shapes, and must run as well.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._scale = target.key.head_dim**-0.5
        self._group = target.shape.heads // target.shape.kv_heads

    def why_wrong(self, shapes: ShapeSet) -> str | None:
        """A reason why the shapes must not be used, or None."""
        try:
            bound = self._bound
            for shape, packs in self._forms(shapes):
                error = self._error((shape,), packs)
                if not error <= bound:
                    return f"its relative RMSE is {error:.2e}, and at most {bound:.2e} is allowed"
            first: tuple[Tensor, Tensor] | None = None
            for keys in self._keys:
                for shape, packs in self._forms(shapes):
                    got = self._with_all_features(keys, (shape,), packs)
                    first = first or got
                    if not all(torch.equal(x, y) for x, y in zip(got, first, strict=True)):
                        return f"its bits depend on the batch: they differ with {shape.block_m} rows, {packs[0]} heads a tile, {keys.where}"
        except Exception as error:
            reason = in_one_line(error)
            wait()
            return f"it can not serve all calls: {reason}"
        return None

    def _forms(self, shapes: ShapeSet) -> Iterator[tuple[Any, tuple[int, ...]]]:
        for shape in shapes:
            for pack in packs_for(self._group, shapes[0].block_m):
                if pack <= shape.block_m:
                    yield shape, (pack,)

    @cached_property
    def _tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return random_tensors(self._target, int(_BATCH[:, 1].sum()), int(_BATCH.sum()))

    @cached_property
    def _rows(self) -> RaggedRows:
        return rows_of(_BATCH, self._target.device)

    @cached_property
    def _keys(self) -> list[_Keys]:
        _, k, v = self._tensors
        return [_Keys("keys side by side", k, v, self._rows), *(self._in_pages(size) for size in _PAGE_SIZES)]

    @cached_property
    def _sinks(self) -> Tensor:
        return torch.linspace(-2.0, 2.0, self._target.shape.heads, device=self._target.device)

    @cached_property
    def _reference(self) -> tuple[Tensor, Tensor]:
        q, k, v = (x.double() for x in self._tensors)
        return reference_attention(q, k, v, self._rows, AttentionOptions(self._scale), torch.float64)

    @cached_property
    def _bound(self) -> float:
        """The default shapes' error, and the rounding of another order of sums."""
        own = self._error(tile_shapes(*self._target.of_kernel), None)
        return rmse_bound(own, self._target.key.dtype, 1, self._reference[1], _SCORE_SIZE)

    def _error(self, shapes: ShapeSet, packs: tuple[int, ...] | None) -> float:
        from cpattn.kernels.ragged_attention import ragged_attention

        q, k, v = self._tensors
        out, _ = ragged_attention(q, k, v, self._rows, scale=self._scale, shapes=shapes, packs=packs)
        return relative_rmse(out, self._reference[0])

    def _with_all_features(self, keys: _Keys, shapes: ShapeSet, packs: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        from cpattn.kernels.ragged_attention import ragged_attention

        q = self._tensors[0]
        into = (
            q.new_zeros(len(q), q.shape[1], self._target.key.v_head_dim, dtype=torch.float32),
            q.new_full((len(q), q.shape[1]), -torch.inf, dtype=torch.float32),
        )
        return ragged_attention(
            q, keys.k, keys.v, keys.rows, scale=self._scale, window=_WINDOW, softcap=_SOFTCAP, sinks=self._sinks,
            into=into, shapes=shapes, packs=packs,
        )  # fmt: skip

    def _in_pages(self, page_size: int) -> _Keys:
        """The same keys in pages, of which each request has its own."""
        _, k, v = self._tensors
        v_in_k, v_head_dim = self._target.key.v_in_k, v.shape[-1]
        message = k if v_in_k else torch.cat([k, v], dim=-1)
        lens = _BATCH.sum(1)
        num_pages = -(-lens // page_size)
        first = np.cumsum(num_pages) - num_pages
        pages = message.new_zeros(int(num_pages.sum()), page_size, *message.shape[1:])
        flat = pages.view(-1, *message.shape[1:])
        begin = 0
        for page, length in zip(first * page_size, lens, strict=True):
            flat[page : page + length] = message[begin : begin + length]
            begin += length
        table = torch.from_numpy(first[:, None] + np.arange(num_pages.max())).to(k.device, torch.int32)
        host = self._rows.host
        rows = RaggedRows.build(host.q_len, np.zeros_like(host.k_start), host.k_len, host.diagonal, k.device, host.request)
        k_pages = pages[..., : k.shape[-1]]
        v_pages = k_pages[..., :v_head_dim] if v_in_k else pages[..., k.shape[-1] :]
        return _Keys(f"pages of {page_size}", k_pages, v_pages, rows.with_pages(table, page_size))
