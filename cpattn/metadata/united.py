"""Ranks that follow each other, united in groups: the layout of a batch over the groups, and where each rank's rows are in it.

Of ``n`` ranks in groups of ``within``, group ``g`` has the ranks ``g * within`` and on. A group's rows are those of its ranks in the order
of the batch, as if it were one rank.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor

from cpattn.device_tables import IntArray, exclusive_cumsum, expand_all
from cpattn.metadata.bucket import Bucket
from cpattn.metadata.callers_partition import CallersPartition
from cpattn.metadata.chunks import joined
from cpattn.metadata.cp_metadata import CPMetadata
from cpattn.metadata.layout import Layout


def united_layout(plan: Layout, within: int) -> Layout:
    """The batch over groups of so many ranks, of which ``cp_size`` is a multiple.

    >>> import cpattn
    >>> united_layout(cpattn.plan([(0, 8)], cp_size=4), 2).chunk_table
    Chunks(request=array([0, 0, 0]), start=array([0, 2, 6]), length=array([2, 4, 2]), rank=array([0, 1, 0]))
    """
    if within == 1:
        return plan
    made: Layout | None = plan.memo.get(("united", within))
    if made is None:
        made = _united(plan, within)
        plan.memo.keep(("united", within), made)
    return made


def _united(plan: Layout, within: int) -> Layout:
    groups = plan.cp_size // within
    if groups == 1:
        return Layout(plan.batch, 1, "contiguous")
    table = plan.chunk_table
    chunks = table._replace(rank=table.rank // within)
    return Layout(plan.batch, groups, CallersPartition(f"{plan.kind} of groups", joined(chunks) if len(chunks.rank) else chunks))


class UnitedRows(NamedTuple):
    """What a group of ranks has. Index tensors are int32 on the metadata's device; a negative entry stands for padding.

    Attributes:
        meta: of the group, as if it were one rank.
        order ``[meta.rows]``: where each of its rows lies among those of its ranks, rank after rank.
        back ``[within * rows]``: the other way round, where each row of its ranks lies among the group's.
    """

    meta: CPMetadata
    order: Tensor
    back: Tensor

    @classmethod
    def of(cls, meta: CPMetadata, within: int) -> UnitedRows:
        """Of the group that this rank is in."""
        united: CPMetadata = meta.derive(("united", within), lambda: _metadata(meta, within))
        order, back = meta.derive(("united rows", within), lambda: _tables(meta, within, united.rows))
        return cls(united, order, back)


def _metadata(meta: CPMetadata, within: int) -> CPMetadata:
    bucket = meta.bucket
    if bucket is not None:
        bucket = Bucket(bucket.max_requests, within * bucket.max_rows, within * bucket.max_chunks, bucket.max_seqlen)
    return CPMetadata(united_layout(meta.plan, within), meta.cp_rank // within, meta.device, bucket)


def _tables(meta: CPMetadata, within: int, united_rows: int) -> tuple[Tensor, Tensor]:
    plan: Layout = meta.plan
    by_rank, lengths = plan.by_rank, plan.chunk_table.length
    first = meta.cp_rank // within * within
    entries = [by_rank.entries(rank) for rank in range(first, first + within)]
    # In the order of the batch, which is that of the table.
    in_order = np.sort(np.concatenate(entries))
    lies_at = (plan.chunk_table.rank[in_order] - first) * meta.rows + by_rank.rows[in_order]
    order = _with_padding(lies_at, lengths[in_order], united_rows)
    begins = np.zeros(len(lengths), dtype=np.int64)
    begins[in_order] = exclusive_cumsum(lengths[in_order])
    runs = [_with_padding(begins[mine], lengths[mine], meta.rows) for mine in entries]
    back = tuple(np.concatenate(columns) for columns in zip(*runs, strict=True))
    tables = expand_all({"order": order, "back": (back[0], back[1])}, meta.device)
    return tables["order"], tables["back"]


def _with_padding(first: IntArray, lengths: IntArray, rows: int) -> tuple[IntArray, IntArray]:
    """Runs of rows, and after them one of negative numbers, up to so many rows."""
    padding = rows - int(lengths.sum())
    return np.append(first, -padding), np.append(lengths, padding)
