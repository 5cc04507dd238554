"""Where the keys lie that a rank reads in its own rows: a table on the device."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from cpattn.device_tables import IntArray, Unsent
from cpattn.keys import NOT_HERE
from cpattn.metadata.cp_metadata import CPMetadata
from cpattn.metadata.draft import Draft
from cpattn.metadata.own_keys import own_begins


def own_places_draft(meta: CPMetadata) -> Draft[Tensor]:
    """Of :attr:`cpattn.keys.OwnRows.places`, of as many requests as a bucket may have."""
    return Draft("own places", lambda: Unsent({"places": _own_places(meta)}, lambda sent: sent["places"]))


def _own_places(meta: CPMetadata) -> IntArray:
    plan = meta.plan
    places = np.zeros((len(plan.batch) if meta.bucket is None else meta.bucket.max_requests, 2), dtype=np.int64)
    places[:, 0] = NOT_HERE
    places[: len(plan.batch), 0] = own_begins(plan, meta.cp_rank)
    # Of a request's chunks the first one is the last to be written.
    entries = plan.by_rank.entries(meta.cp_rank)[::-1]
    request = plan.chunk_table.request[entries]
    places[request, 1] = plan.chunk_rows[entries] - plan.prefix_lens[request]
    return places.ravel()
