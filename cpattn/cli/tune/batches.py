"""The batches that tile shapes are timed on: one rank's attention after an all-gather."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cpattn.attention.rows import RaggedRows
from cpattn.cli.tune.target import Target
from cpattn.errors import CPError
from cpattn.kernels.tile_candidates import ShapeSet

_RAGGED = np.random.default_rng(0).integers([0, 1], [4096, 400], (64, 2))
# (prefix_len, extend_len) of each request, and what the batch is.
BATCHES: dict[str, tuple[str, list[tuple[int, int]]]] = {
    "long": ("one request of 16k", [(0, 16384)]),
    "chunks": ("8 chunks of 512 over 4k", [(4096, 512)] * 8),
    "ragged": ("64 chunks of 1 to 399 over 0 to 4k", [(int(prefix), int(extend)) for prefix, extend in _RAGGED]),
    "decode": ("one token each over 32 caches of 8k", [(8191, 1)] * 32),
}


class TuneBatch(NamedTuple):
    """A batch on the device.

    Attributes:
        q, k, v: all batches share these; a batch reads their first rows.
    """

    name: str
    meaning: str
    rows: RaggedRows
    q: Tensor
    k: Tensor
    v: Tensor

    def attend(self, target: Target, shapes: ShapeSet) -> Any:
        """Launches the kernel with the shape that it chooses from these."""
        from cpattn.kernels.ragged_attention import ragged_attention

        return ragged_attention(self.q, self.k, self.v, self.rows, scale=target.key.head_dim**-0.5, shapes=shapes)


def make_batches(target: Target) -> list[TuneBatch]:
    """The batches, with random tensors. Raises CPError if the device has not enough memory."""
    tables = [np.array(batch) for _, batch in BATCHES.values()]
    try:
        q, k, v = random_tensors(target, max(int(t[:, 1].sum()) for t in tables), max(int(t.sum()) for t in tables))
    except torch.OutOfMemoryError as error:
        raise CPError(f"the batches do not fit the device's free memory; take fewer --kv-heads, or free some: {error}") from error
    made = []
    for (name, (meaning, _)), table in zip(BATCHES.items(), tables, strict=True):
        rows = rows_of(table, target.device)
        made.append(TuneBatch(name, meaning, rows, q[: rows.num_queries], k[: int(table.sum())], v[: int(table.sum())]))
    return made


def rows_of(table: Any, device: torch.device) -> RaggedRows:
    """Each request's new tokens against all its keys, which lie one after the other. ``table`` is int ``[n, 2]``."""
    extend, total = table[:, 1], table.sum(1)
    return RaggedRows.build(extend, np.cumsum(total) - total, total, table[:, 0] + 1, device, np.arange(len(table)))


def random_tensors(target: Target, num_queries: int, num_keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, and k and v as views of one message, as they lie after an all-gather."""
    shape, key = target.shape, target.key
    generator = torch.Generator(target.device).manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=key.dtype, device=target.device).normal_(generator=generator)

    q = normal(num_queries, shape.heads, key.head_dim)
    kv = normal(num_keys, shape.kv_heads, key.head_dim + (0 if key.v_in_k else key.v_head_dim))
    k = kv[..., : key.head_dim]
    return q, k, k[..., : key.v_head_dim] if key.v_in_k else kv[..., key.head_dim :]
