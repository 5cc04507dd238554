"""cpattn's own calls, and its launches alone."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch

import cpattn
from cpattn.attention.backend import AttentionOptions
from cpattn.keys import Keys
from cpattn.spans import Spans
from cpattn.testing import SoloCommunicator
from peers.work import Call, Work

NO_TRANSFER = "no transfer"


def cp_attention(work: Work, strategy: str, transport: str, backend: str) -> Call:
    """A call by a strategy, a backend, and a kind of transport or ``"no transfer"``: what others would send is a local copy."""
    meta = cpattn.build_metadata(work.batch, work.size, work.rank, device=work.device)
    q, k, v = (cpattn.shard(x, meta) for x in (work.q, work.k, work.v))
    cache_of_all = cpattn.PackedKV(work.prefix_k, work.prefix_v) if len(work.prefix_k) else None
    group: Any = _alone(work.rank, work.size) if transport == NO_TRANSFER else cpattn.transport(kind=transport)  # type: ignore[arg-type]
    attend = partial(cpattn.cp_attention, q, k, v, meta, group=group, kv_cache=cache_of_all, strategy=strategy, backend=backend)
    tokens = None if transport == NO_TRANSFER else meta.token_index[: meta.num_tokens].long()
    return Call(lambda: attend()[: meta.num_tokens], tokens)


@cache
def _alone(rank: int, size: int) -> SoloCommunicator:
    """One for all variants, as they share a group's transport and its memory as well."""
    return SoloCommunicator(rank, size)


def one_gpu(work: Work, backend: str) -> Call:
    """The whole batch in one launch, on each rank's device."""
    return launch(replace(work, rank=0, size=1), backend)


def launch(work: Work, backend: str) -> Call:
    """This rank's launch alone, on keys that are in order already."""
    meta = cpattn.build_metadata(work.batch, work.size, work.rank, device=work.device)
    q = cpattn.shard(work.q, meta)[: meta.num_tokens]
    table = meta.chunk_host
    spans = Spans.build(table.q_len, meta.k_starts[table.request], table.k_len, table.k_len - table.q_len + 1, work.device)
    keys = []
    for new, cached in ((work.k, work.prefix_k), (work.v, work.prefix_v)):
        whole = new.new_empty(len(new) + len(cached), *new.shape[1:])
        whole[meta.extend_key_rows.long()] = new
        whole[meta.prefix_key_rows.long()] = cached
        keys.append(whole)
    options = AttentionOptions(q.shape[2] ** -0.5)
    attend = partial(cpattn.BACKENDS[backend].attend, q, Keys(*keys), spans, options, q.dtype)
    return Call(lambda: attend()[0], meta.token_index[: meta.num_tokens].to(torch.int64))
