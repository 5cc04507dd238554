"""RaggedRows: the one description of work that every backend takes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from cpattn.metadata.batch import IntArray
from cpattn.metadata.device_tables import to_device

# How the rows lie to their diagonal; a kernel that knows only some of these is kept away from the others.
#   bottom_right: the last query of every row sees the range's last key and no further: what "causal" means in varlen kernels
#   full:         every query of every row sees its whole range: no mask at all
#   any:          anything else
Alignment: TypeAlias = Literal["bottom_right", "full", "any"]


class HostRows(NamedTuple):
    """The rows as int64 arrays on the host, for backends that loop or choose by length."""

    q_start: IntArray
    q_len: IntArray
    k_start: IntArray
    k_len: IntArray
    diagonal: IntArray


@dataclass(frozen=True, eq=False)
class RaggedRows:
    """Rows of attention work: which queries see which keys. All of a launch's rows together, in any number.

    Row ``i`` is the queries ``cu_seqlens_q[i] .. cu_seqlens_q[i + 1] - 1`` against the keys ``k_start[i] ..
    k_start[i] + k_len[i] - 1``. Query ranges follow each other; key ranges may lie anywhere and overlap.
    Query ``j`` of the row (from 0) sees the first ``clamp(diagonal[i] + j, 0, k_len[i])`` keys of its range, and with
    a window ``W`` those from number ``diagonal[i] + j - W`` on. The diagonal is thus the number of keys that the row's
    first query would see in a range without end; it may lie beyond the range (all keys are in the past) or below 1.

    Attributes:
        cu_seqlens_q: int32 ``[n + 1]``, begins with 0.
        k_start, k_len, diagonal: int32 ``[n]``.
        k_start_padded: int32 ``[n + 1]``: k_start and one entry more, for kernels that take starts as cumulative lengths.
        max_seqlen_q, max_seqlen_k: the longest query range and the longest key range, in rows (0 if there is none).
        alignment: what holds for all rows; see :data:`Alignment`.
        host: the same numbers on the host.
    """

    cu_seqlens_q: Tensor
    k_start_padded: Tensor
    k_len: Tensor
    diagonal: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    alignment: Alignment
    host: HostRows

    def __len__(self) -> int:
        return len(self.host.q_len)

    @property
    def k_start(self) -> Tensor:
        return self.k_start_padded[:-1]

    @cached_property
    def num_queries(self) -> int:
        """Query rows that the work covers; what lies beyond them in q is padding."""
        return int(self.host.q_len.sum())

    def tiled_pairs(self, tile: int, pack: int) -> float:
        """Query-key pairs that a kernel computes whose tiles hold ``tile`` rows, where a query takes up ``pack`` of them
        (that many heads share a tile); the padding of the last tile of each row is computed as well."""
        return float((-(-self.host.q_len * pack // tile) * tile / pack * self.host.k_len).sum())

    @cached_property
    def has_empty_range(self) -> bool:
        """Whether some row has no keys at all."""
        return bool((self.host.k_len == 0).any())

    @classmethod
    def build_all(cls, tables: list[tuple[IntArray, IntArray, IntArray, IntArray]], device: torch.device | str) -> list[RaggedRows]:
        """Makes one RaggedRows for each (q_len, k_start, k_len, diagonal), with one copy to the device for all."""
        hosts = [HostRows(np.cumsum(t[0]) - t[0], *t) for t in tables]
        packed: dict[str, IntArray] = {}
        for i, host in enumerate(hosts):
            packed[f"cu_seqlens_q {i}"] = np.append(host.q_start, host.q_len.sum())
            packed[f"k_start_padded {i}"] = np.append(host.k_start, 0)
            packed |= {f"{name} {i}": getattr(host, name) for name in ("k_len", "diagonal")}
        on_device = to_device(packed, torch.device(device))
        return [
            cls(
                cu_seqlens_q=on_device[f"cu_seqlens_q {i}"],
                k_start_padded=on_device[f"k_start_padded {i}"],
                k_len=on_device[f"k_len {i}"],
                diagonal=on_device[f"diagonal {i}"],
                max_seqlen_q=int(host.q_len.max(initial=0)),
                max_seqlen_k=int(host.k_len.max(initial=0)),
                alignment=_alignment(host),
                host=host,
            )
            for i, host in enumerate(hosts)
        ]

    @classmethod
    def build(
        cls, q_len: IntArray, k_start: IntArray, k_len: IntArray, diagonal: IntArray, device: torch.device | str = "cpu"
    ) -> RaggedRows:
        """Makes one RaggedRows from integer arrays ``[n]``, one entry a row."""
        table = tuple(np.asarray(column, dtype=np.int64) for column in (q_len, k_start, k_len, diagonal))
        return cls.build_all([table], device)[0]  # type: ignore[list-item]


def _alignment(host: HostRows) -> Alignment:
    # A row without keys or without queries fits any alignment.
    has_work = (host.k_len > 0) & (host.q_len > 0)
    if (~has_work | (host.diagonal + host.q_len - 1 == host.k_len)).all():
        return "bottom_right"
    if (~has_work | (host.diagonal >= host.k_len)).all():
        return "full"
    return "any"
