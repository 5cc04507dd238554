"""Where tokens of a sharded cache lie, as tensors of one rank's metadata: what it writes to its pages, and reads from them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cpattn.device_tables import Int32Array, IntArray, Table, exclusive_cumsum, expand_runs_on_host, send, unsent
from cpattn.metadata.chunk_tables import chunk_tables
from cpattn.metadata.cp_metadata import CPMetadata
from cpattn.metadata.draft import Draft
from cpattn.metadata.layout import Layout

Places = tuple[Tensor, Tensor]


def owned_places(meta: CPMetadata) -> Places:
    """Of each row of the gathered buffer ``[cp_size * rows]``: its request, and its number among the request's tokens that this
    rank holds; -1 where another rank holds it, and on padding."""

    request, number = meta.derive_sent(owned_places_draft(meta))
    return request, number


def owned_places_draft(meta: CPMetadata) -> Draft[tuple[Tensor, ...]]:
    """The same, to be sent with other tables."""
    return Draft("owned places", lambda: unsent(_owned_places(meta)))


def _owned_places(meta: CPMetadata) -> list[Table]:
    plan: Layout = meta.plan
    if plan.owner is None:
        # Each rank keeps what it computes.
        places = np.full((2, plan.cp_size, meta.rows), -1, dtype=np.int32)
        q_len = meta.chunk_host.q_len
        places[0, meta.cp_rank, : meta.num_tokens] = expand_runs_on_host(meta.chunk_host.request, q_len, meta.num_tokens, step=0)
        places[1, meta.cp_rank, : meta.num_tokens] = expand_runs_on_host(meta.held_starts, q_len, meta.num_tokens)
        return [places[0].ravel(), places[1].ravel()]
    request, position = meta.gathered_runs.request(), meta.gathered_runs.position().astype(np.int64)
    is_own = (position >= 0) & (plan.owner.ranks(position, plan.cp_size) == meta.cp_rank)
    return [np.where(is_own, request, -1), np.where(is_own, plan.owner.numbers(position, plan.cp_size), -1)]


def kept_places(meta: CPMetadata) -> Places:
    """Where each rank has rows of all tokens: of each row ``[rows]`` its request, and its number among the request's tokens that this
    rank holds; -1 where another rank does, and on padding."""

    def build() -> Places:
        plan, rank = meta.plan, meta.cp_rank
        request = np.arange(len(plan.batch)).repeat(plan.extend_lens)
        if plan.owner is not None:
            begins = exclusive_cumsum(plan.extend_lens)
            position = (plan.prefix_lens - begins)[request] + np.arange(plan.num_tokens)
            is_own, number = plan.owner.ranks(position, plan.cp_size) == rank, plan.owner.numbers(position, plan.cp_size)
        else:
            is_own = plan.chunk_table.rank_of_tokens == rank
            kept = plan.rank_extends[:, rank]
            number = is_own.cumsum() - 1 + (plan.shard_lens[:, rank] - exclusive_cumsum(kept))[request]
        places = np.full((2, meta.rows), -1)
        places[0, : len(request)], places[1, : len(request)] = np.where(is_own, request, -1), np.where(is_own, number, -1)
        own_request, own_number = send(list(places), meta.device)
        return own_request, own_number

    return meta.derive("kept places", build)


def owned_places_by_rank(meta: CPMetadata) -> list[Places]:
    """The same of each rank's rows, ``[rows]`` each."""
    request, number = owned_places(meta)
    return list(zip(torch.split(request, meta.rows), torch.split(number, meta.rows), strict=True))


def cached_places(meta: CPMetadata) -> Places:
    """Of each token of a prefix that this rank holds, request after request: its request and its number there. Then -1, up to
    the number of the rank that holds the most."""
    plan: Layout = meta.plan
    cached = plan.shard_lens[:, meta.cp_rank]
    most = int(plan.shard_lens.sum(axis=0).max())
    return meta.derive("cached places", lambda: _places_in_shard(meta, cached, cached, most))


def striped_places(meta: CPMetadata) -> Places:
    """The same of each token that this rank holds, cached and new."""
    held = meta.plan.held_lens
    most = int(held.sum(axis=0).max())
    return meta.derive("striped places", lambda: _places_in_shard(meta, held[:, meta.cp_rank], held[:, meta.cp_rank], most))


def places_in_shard(meta: CPMetadata) -> Places:
    """Of each row of a shard that this rank sends: of each request what is cached here, and then, as -1, the new tokens that this
    rank computes. Then -1, up to the rows of the largest shard."""
    plan: Layout = meta.plan
    cached = plan.shard_lens[:, meta.cp_rank]
    total = cached + plan.rank_extends[:, meta.cp_rank]
    return meta.derive("places in shard", lambda: _places_in_shard(meta, cached, total, plan.largest_shard))


def new_rows_in_shards(meta: CPMetadata) -> list[Tensor]:
    """Of each rank the rows ``[rows]`` of its new tokens, in its local order, within its shard; -1 on padding."""

    def build() -> list[Tensor]:
        return list(send([_new_rows(meta, rank) for rank in range(meta.plan.cp_size)], meta.device))

    return meta.derive("new rows in shards", build)


def _places_in_shard(meta: CPMetadata, cached: IntArray, lengths: IntArray, size: int) -> Places:
    total = int(lengths.sum())
    places = np.full((2, size), -1, dtype=np.int32)
    places[0, :total] = expand_runs_on_host(np.arange(len(lengths)), lengths, total, step=0)
    number = expand_runs_on_host(np.zeros_like(lengths), lengths, total)
    places[1, :total] = np.where(number < cached[places[0, :total]], number, -1)
    request, number_held = send(list(places), meta.device)
    return request, number_held


def _new_rows(meta: CPMetadata, rank: int) -> Int32Array:
    plan: Layout = meta.plan
    chunks = chunk_tables(plan, rank)
    cached, extends = plan.shard_lens[:, rank], plan.rank_extends[:, rank]
    # A rank's rows are its requests' new tokens one after another; before each request's lie as many cached ones more.
    shift = (exclusive_cumsum(cached) + cached)[chunks.request]
    rows = exclusive_cumsum(chunks.q_len) + shift
    total = int(extends.sum())
    padded = np.full(meta.rows, -1, dtype=np.int32)
    padded[:total] = expand_runs_on_host(rows, chunks.q_len, total)
    return padded
