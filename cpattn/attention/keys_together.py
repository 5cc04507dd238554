"""Keys that lie in several places, copied together for who reads them in one: the reference, in whatever compares with it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from cpattn.attention.reference import keys_of
from cpattn.keys import Keys
from cpattn.spans import Spans


def keys_together(keys: Keys, spans: Spans) -> tuple[Keys, Spans]:
    """All keys of each span, one span after another, and the spans over them; what it is given where they lie in one place."""
    if keys.prefix is None and keys.own is None:
        return keys, spans
    host = spans.host
    pieces = [
        piece
        for k_start, k_len, request in zip(host.k_start.tolist(), host.k_len.tolist(), host.request.tolist(), strict=True)
        for piece in _pieces(keys, k_start, k_len, request)
    ]
    k, v = (torch.cat(column) for column in zip(*pieces, strict=True))
    begins = np.cumsum(host.k_len) - host.k_len
    together = Spans.build(host.q_len, begins, host.k_len, host.diagonal, spans.k_len.device, host.request)
    return Keys(k, v, None, keys.k_scale, keys.v_scale), together


def _pieces(keys: Keys, k_start: int, k_len: int, request: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The keys of a span: of a prefix, in order, and in own rows."""
    prefix, own = keys.prefix, keys.own
    kept, near, row = 0, k_len, 0
    if prefix is not None:
        most, first_row = _places(prefix.places, request)
        kept = min(k_len, most)
        begin = first_row if prefix.page_table is None else 0
        yield keys_of(Keys(prefix.k, prefix.v, prefix.page_table), request, begin, begin + kept)
    if own is not None:
        first, row = _places(own.places, request)
        near = min(k_len, first)
    yield keys.k[k_start + kept : k_start + near], keys.v[k_start + kept : k_start + near]
    if own is not None and near < k_len:
        yield own.k[row + near : row + k_len], own.v[row + near : row + k_len]


def _places(places: Tensor, request: int) -> tuple[int, int]:
    first, row = places[2 * request : 2 * request + 2].tolist()
    return first, row
