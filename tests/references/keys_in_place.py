"""A backend that reads keys wherever they lie, as the kernel for Hopper does: a copy of each span's keys, and the reference."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from cpattn.attention.backend import Backend
from cpattn.attention.reference import reference_attention
from cpattn.attention.registry import BACKENDS
from cpattn.keys import Keys, PrefixKeys
from cpattn.options import AttentionOptions
from cpattn.spans import Spans


def in_place_backend(seen: list[Keys], *, waits: bool = False) -> Backend:
    """It notes the keys of each launch; with ``waits`` they may come late."""
    return replace(
        BACKENDS["reference"],
        attend=partial(attend_in_place, seen),
        waits_for_keys=lambda problem: waits,
        reads_in_place=lambda problem: True,
    )


def slots(prefix: PrefixKeys, request: int, count: int) -> Tensor:
    """Of a request's first keys in pages."""
    assert prefix.page_table is not None
    key = torch.arange(count)
    return prefix.page_table[request].long()[key // prefix.page_size] * prefix.page_size + key % prefix.page_size


def attend_in_place(
    seen: list[Keys], q: Tensor, keys: Keys, spans: Spans, options: AttentionOptions, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Copies each span's keys together from wherever they are, and notes where that is."""
    seen.append(keys)
    ks, vs, host = [], [], spans.host
    for k_start, k_len, request in zip(host.k_start, host.k_len, host.request, strict=True):
        kept, near = 0, k_len
        if keys.prefix is not None:
            most, row = keys.prefix.places.view(-1, 2)[request].tolist()
            kept = min(k_len, most)
            rows = range(row, row + kept) if keys.prefix.page_table is None else slots(keys.prefix, request, kept)
            ks.append(keys.prefix.k.flatten(0, -3)[rows])
            vs.append(keys.prefix.v.flatten(0, -3)[rows])
        if keys.own is not None:
            first, row = keys.own.places.view(-1, 2)[request].tolist()
            near = min(k_len, first)
        ks.append(keys.k[k_start + kept : k_start + near])
        vs.append(keys.v[k_start + kept : k_start + near])
        if keys.own is not None:
            ks.append(keys.own.k[row + near : row + k_len])
            vs.append(keys.own.v[row + near : row + k_len])
    begins = np.cumsum(host.k_len) - host.k_len
    copied = Spans.build(host.q_len, begins, host.k_len, host.diagonal, request=host.request)
    return reference_attention(q, Keys(torch.cat(ks), torch.cat(vs)), copied, options, dtype)
