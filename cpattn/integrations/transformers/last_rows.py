"""Where the last token of each request lies: the rows whose logits are all that a prefill needs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor

from cpattn.device_tables import DeviceTables
from cpattn.metadata.cp_metadata import CPMetadata


class LastRows(NamedTuple):
    """The last tokens of all requests, of which each rank holds some.

    Attributes:
        keep: int64 ``[count]``: this rank's rows that hold one, then row 0 until there are as many as on the fullest rank.
        request ``[n]``: the requests that have a token, int64.
        place ``[n]``: where their last tokens lie once the ``count`` rows of every rank are gathered, rank after rank.
    """

    keep: Tensor
    request: Tensor
    place: Tensor


def last_rows(meta: CPMetadata) -> LastRows:
    """The last rows of a batch; worked out at the first call with these metadata, but for those of a bucket, whose batches
    have other numbers of last rows."""
    return _build(meta) if meta.bucket is not None else meta.derive("rows of last tokens", lambda: _build(meta))


def _build(meta: CPMetadata) -> LastRows:
    plan = meta.plan
    request = plan.extend_lens.nonzero()[0]
    # The last chunk of each request.
    entry = np.searchsorted(plan.chunk_table.request, request, side="right") - 1
    row = plan.chunk_rows[entry] + plan.chunk_table.length[entry] - 1
    rank = plan.chunk_table.rank[entry]

    held = np.bincount(rank, minlength=plan.cp_size)
    count = int(held.max())
    keep = np.zeros(count, dtype=np.int64)
    keep[: held[meta.cp_rank]] = row[rank == meta.cp_rank]
    nth_on_rank = np.zeros(len(request), dtype=np.int64)
    for r in range(plan.cp_size):
        nth_on_rank[rank == r] = np.arange(held[r])
    tables = DeviceTables({"keep": keep, "request": request, "place": rank * count + nth_on_rank}, meta.device)
    # Models index with what they are told to keep, and not every one takes int32.
    return LastRows(tables["keep"].long(), tables["request"].long(), tables["place"])
