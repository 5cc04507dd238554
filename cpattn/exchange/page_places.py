"""Where new keys go in pages that every rank holds whole: first those that a rank's queries see, and then the rest.

A place is the request of a row and its absolute position; a negative position stands for a row that goes nowhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from cpattn.device_tables import Int32Array, IntArray, Unsent, exclusive_cumsum, expand_all, unsent, unsent_runs
from cpattn.exchange.key_order import Ordered, RequestRows
from cpattn.exchange.seen_keys import arrivals, seen_keys
from cpattn.metadata.cp_metadata import CPMetadata
from cpattn.metadata.draft import Draft
from cpattn.metadata.layout import Layout
from cpattn.metadata.needed_keys import Pieces, unseen_tokens

Places: TypeAlias = tuple[Tensor, Tensor]


class Parted(NamedTuple):
    """All ranks' rows, rank after rank, in two parts.

    Attributes:
        seen: the places of those that this rank's queries see; rest: of all others.
    """

    seen: Places
    rest: Places


def parted_places(meta: CPMetadata, window: int | None) -> Parted:
    """For queries that see ``window`` keys, or all. It holds for any batch of a bucket, as offsets lie on the device."""
    meta.derive_together(*parted_drafts(meta, window))
    (request, _), (seen, rest) = (meta.derive_sent(draft) for draft in parted_drafts(meta, window))
    return Parted((request, seen), (request, rest))


def parted_drafts(meta: CPMetadata, window: int | None) -> tuple[Draft[tuple[Tensor, ...]], ...]:
    """What they are made of, to be sent with other tables."""
    return meta.gathered_places_draft, Draft(("parted places", window), lambda: unsent(_parted(meta, window)))


def _parted(meta: CPMetadata, window: int | None) -> list[Int32Array]:
    runs, seen = meta.gathered_runs, seen_keys(meta, window).pieces
    # Of each chunk its first tokens.
    unseen = meta.plan.chunk_table.length.copy()
    unseen[seen.entry] -= seen.length
    return [runs.part(unseen, first=False), runs.part(unseen, first=True)]


def hole_places(meta: CPMetadata, window: int) -> Places:
    """Of the new tokens before a rank's last query that no window of its queries reaches, request after request."""

    def build() -> Places:
        plan: Layout = meta.plan
        seen = seen_keys(meta, window)
        request, position, _ = _in_pages(plan, seen.pieces)
        # A bucket's batch may have one for each token of another rank.
        most = None if meta.bucket is None else plan.cp_size * meta.rows
        return _expanded(request, position - seen.holes, seen.holes, meta.device, most)

    return meta.derive(("hole places", window), build)


def ordered_places(meta: CPMetadata, window: int | None) -> Places:
    """Of all rows in the order of :func:`cpattn.exchange.step_spans.spans_in_order`, cached ones first in each request. Nowhere is a
    new one that no query of this rank sees."""

    def build() -> Places:
        plan: Layout = meta.plan
        rows, seen = RequestRows.of(meta, Ordered.SEEN), seen_keys(meta, window)
        cached = rows.put.nonzero()[0]
        request, position, length = _in_pages(plan, seen.pieces)
        holes = seen.holes
        # Of each request the cached ones, and then of each piece what nobody sees before it, and itself.
        runs = [(cached, 0 * cached, rows.put[cached])]
        runs.append((request.repeat(2), np.stack([-holes, position], axis=1).ravel(), np.stack([holes, length], axis=1).ravel()))
        request, position, length = (np.concatenate(columns) for columns in zip(*runs, strict=True))
        order = request.argsort(kind="stable")
        return _expanded(request[order], position[order], length[order], meta.device)

    return meta.derive(("ordered places", window), build)


def needed_places(meta: CPMetadata, window: int | None) -> Places:
    """Of the rows of :class:`cpattn.exchange.needed_rows.NeededRows`: this rank's tokens, and then what arrives of those that it needs."""

    def build() -> Places:
        plan: Layout = meta.plan
        chunks, seen = meta.chunk_host, seen_keys(meta, window)
        request, position, length = _in_pages(plan, seen.pieces.take(arrivals(plan, seen, meta.cp_rank)))
        own = chunks.request, chunks.k_len - chunks.q_len, chunks.q_len
        request, position, length = (np.concatenate(columns) for columns in zip(own, (request, position, length), strict=True))
        return _expanded(request, position, length, meta.device)

    return meta.derive(("needed places", window), build)


class PlacesInOrder(NamedTuple):
    """Of rows in the order of :attr:`cpattn.exchange.key_order.Ordered.ALL_NEW`.

    Attributes:
        new: the place of each row, where it is a new token's.
        cached, cached_rows: the places of cached tokens that have rows and that this rank's queries see, and those rows; None where there
            are none.
    """

    new: Places
    cached: Places | None
    cached_rows: Tensor | None


def places_in_order(meta: CPMetadata) -> PlacesInOrder:
    """The rows are the same on all ranks."""
    return meta.derive_sent(places_in_order_draft(meta))


def places_in_order_draft(meta: CPMetadata) -> Draft[PlacesInOrder]:
    """The same, to be sent with other tables."""
    return Draft("places in order", lambda: _places_in_order(meta))


def _places_in_order(meta: CPMetadata) -> Unsent[PlacesInOrder]:
    plan: Layout = meta.plan
    rows, requests = RequestRows.of(meta, Ordered.ALL_NEW), np.arange(len(plan.batch))
    put = rows.put * (seen_keys(meta, window=None).new_len > 0)
    # Rows of cached tokens are in the pages already.
    positions, lengths = np.stack([-rows.put, plan.prefix_lens], axis=1).ravel(), np.stack([rows.put, rows.new], axis=1).ravel()
    runs = {"new request": (requests.repeat(2), lengths), "new position": (positions, lengths)}
    if put.any():
        runs |= {"request": (requests, put), "position": (rows.kept, put), "rows": (rows.begins, put)}
    places = unsent_runs(runs, meta.device, repeated=("new request", "request"))

    def finish(sent: Mapping[str, Tensor]) -> PlacesInOrder:
        found = places.finish(sent)
        new = found["new request"], found["new position"]
        if "rows" not in found:
            return PlacesInOrder(new, None, None)
        return PlacesInOrder(new, (found["request"], found["position"]), found["rows"])

    return Unsent(places.tables, finish)


class RestRows(NamedTuple):
    """What travels after the rows that are needed: to each other rank those of this one's tokens that no query of it sees.

    Attributes:
        sent, received: rows to and from each rank, ``[cp_size]``.
        outgoing: int32 ``[sum(sent)]``, its own rows, those for rank 0 first.
        places: of the rows received, those of rank 0 first.
    """

    sent: tuple[int, ...]
    received: tuple[int, ...]
    outgoing: Tensor
    places: Places


def rest_rows(meta: CPMetadata, window: int | None) -> RestRows:
    """For queries that see ``window`` keys, or all."""

    def build() -> RestRows:
        plan: Layout = meta.plan
        mine, chunks, own = meta.cp_rank, plan.chunk_table, plan.by_rank.entries(meta.cp_rank)
        # Of each of its chunks what no query of a rank sees; itself sees all.
        unseen = np.stack([unseen_tokens(plan, window, viewer)[own] for viewer in range(plan.cp_size)])
        leaving = np.tile(plan.chunk_rows[own], plan.cp_size), unseen.ravel()
        arriving = plan.by_rank.order[chunks.rank[plan.by_rank.order] != mine]
        length = unseen_tokens(plan, window, mine)[arriving]
        places = _expanded(chunks.request[arriving], (plan.prefix_lens[chunks.request] + chunks.start)[arriving], length, meta.device)
        received = np.bincount(chunks.rank[arriving], length, minlength=plan.cp_size).astype(np.int64)
        outgoing = expand_all({"rows": leaving}, meta.device)["rows"]
        return RestRows(tuple(unseen.sum(axis=1).tolist()), tuple(received.tolist()), outgoing, places)

    return meta.derive(("rest rows", window), build)


def _in_pages(plan: Layout, pieces: Pieces) -> tuple[IntArray, IntArray, IntArray]:
    """Of each piece the request, the absolute position of its first token, and how many tokens it has."""
    request = plan.chunk_table.request[pieces.entry]
    return request, pieces.token + (plan.prefix_lens - exclusive_cumsum(plan.extend_lens))[request], pieces.length


def _expanded(request: IntArray, position: IntArray, length: IntArray, device: torch.device, size: int | None = None) -> Places:
    """Of each token of runs of tokens; filled up to ``size``."""
    tables = expand_all({"request": (request, length), "position": (position, length)}, device, repeated=("request",), size=size)
    return tables["request"], tables["position"]
