"""cpattn's own calls, and its launches alone."""

from __future__ import annotations

from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import cpattn
from cpattn.attention.backend import AttentionOptions
from cpattn.keys import Keys
from cpattn.spans import Spans
from cpattn.testing import SoloCommunicator
from cpattn.transports.transfer import Transfer
from cpattn.transports.transfer import Work as TransferWork
from peers.work import Call, Work

NO_TRANSFER = "no transfer"
# The same, whose graphs have no copies in place of messages either: what these take is to be added.
NO_MESSAGE = "no message"
ON_GPUS = ("triton", "flash_attn3", "flash_attn4")
# Tokens of a page of a sharded cache.
PAGE_SIZE = 64


def backends_here(device_type: str) -> tuple[str, ...]:
    """Those that are compared: on a GPU the fastest, as far as they are installed, and on a CPU the one that there is."""
    return tuple(name for name in ON_GPUS if cpattn.BACKENDS[name].unavailable() is None) if device_type == "cuda" else ("cpu",)


class _Layout(NamedTuple):
    """One rank's part of the batch as a partition has it, which all of its calls share."""

    meta: cpattn.CPMetadata
    q: Tensor
    k: Tensor
    v: Tensor
    cache: cpattn.PackedKV | cpattn.PagedKV | None


def cp_attention(
    work: Work,
    strategy: str,
    transport: str,
    backend: str,
    partition: str = "zigzag",
    sharded: bool = False,
    token_cost: int | None = None,
) -> Call:
    """A call by a strategy, a backend, and a kind of transport or ``"no transfer"``: what others would send is a local copy, which graphs
    of ``"no message"`` leave out.

    With ``sharded`` each rank holds its share of every prefix, in pages; otherwise each holds all prefixes, in order. ``token_cost`` is
    for ``partition="auto"``, as of :func:`cpattn.plan`.
    """
    meta, q, k, v, kv_cache = _laid_out(work, partition, sharded, token_cost)
    group: Any = None
    is_alone = transport in (NO_TRANSFER, NO_MESSAGE)
    if is_alone:
        group = _alone(_Unheard if transport == NO_MESSAGE else SoloCommunicator, work.rank, work.size)
    elif work.size > 1:
        group = cpattn.transport(work.group, kind=transport)  # type: ignore[arg-type]
    named: dict[str, Any] = {"group": group, "kv_cache": kv_cache, "strategy": strategy, "backend": backend}
    way = ""
    if "auto" in (strategy, backend):
        with torch.no_grad():
            chosen = cpattn.prepare(q, k, v, meta, **named)
        way = f"{chosen.strategy.name}, {chosen.backend.name}"
    attend = partial(cpattn.cp_attention, q, k, v, meta, **named)
    tokens = None if is_alone else meta.token_index[: meta.num_tokens].long()
    return Call(lambda: attend()[: meta.num_tokens], tokens, way=way)


class _Unheard(SoloCommunicator):
    """Copies messages but where a graph captures the call: its layers find what came the last time."""

    def start(self, transfer: Transfer) -> TransferWork:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return TransferWork(lambda: None)
        return super().start(transfer)


@cache
def _alone(kind: type[SoloCommunicator], rank: int, size: int) -> SoloCommunicator:
    """One for all variants, as they share a group's transport and its memory as well."""
    return kind(rank, size)


@cache
def machine_here() -> cpattn.Machine:
    """With the backends that can serve the calls of these benchmarks: by what ``partition="auto"`` chooses."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return cpattn.machine_for(cpattn.Problem(device, torch.bfloat16, 0, 32, 8, 128, 128))


def _laid_out(work: Work, partition: str, sharded: bool, token_cost: int | None = None) -> _Layout:
    key = partition, sharded, work.rank, work.size, token_cost
    if key not in work.kept:
        shards = prefix_shards(work.batch, work.size) if sharded else None
        machine = machine_here() if partition == "auto" else None
        plan = cpattn.plan(work.batch, work.size, partition=partition, prefix_shards=shards, token_cost=token_cost, machine=machine)
        meta = plan.metadata(work.rank, work.device)
        # One rank has everything, in the same order.
        q, k, v = (x if work.size == 1 else cpattn.shard(x, meta) for x in (work.q, work.k, work.v))
        kv_cache: cpattn.PackedKV | cpattn.PagedKV | None = None
        if shards is not None:
            kv_cache = _paged_shard(work, shards)
        elif len(work.prefix_k):
            kv_cache = cpattn.PackedKV(work.prefix_k, work.prefix_v)
        work.kept[key] = _Layout(meta, q, k, v, kv_cache)
    made: _Layout = work.kept[key]
    return made


def prefix_shards(batch: list[tuple[int, int]], size: int) -> list[list[int]]:
    """How many tokens of each prefix each rank holds: as even as can be."""
    return [[prefix // size + (rank < prefix % size) for rank in range(size)] for prefix, _ in batch]


def _paged_shard(work: Work, shards: list[list[int]]) -> cpattn.PagedKV:
    """This rank's run of each prefix, in pages that lie in random order."""
    pages = max(max(held) for held in shards) // PAGE_SIZE + 1
    generator = torch.Generator(work.device).manual_seed(work.rank)
    table = torch.randperm(len(shards) * pages, device=work.device, generator=generator).int().view(len(shards), pages)
    k_pages, v_pages = (x.new_zeros(table.numel(), PAGE_SIZE, *x.shape[1:]) for x in (work.prefix_k, work.prefix_v))
    begin = 0
    for held, row in zip(shards, table.long(), strict=True):
        first, count = begin + sum(held[: work.rank]), held[work.rank]
        slots = torch.arange(count, device=work.device)
        for pool, x in ((k_pages, work.prefix_k), (v_pages, work.prefix_v)):
            pool[row[slots // PAGE_SIZE], slots % PAGE_SIZE] = x[first : first + count]
        begin += sum(held)
    return cpattn.PagedKV(k_pages, v_pages, table)


def one_gpu(work: Work, backend: str) -> Call:
    """The whole batch in one launch, on each rank's device."""
    return launch(work.over(None, 0, 1), backend)


def launch(work: Work, backend: str, partition: str = "zigzag") -> Call:
    """This rank's launch alone, on keys that are in order already."""
    meta, q, *_ = _laid_out(work, partition, False)
    table = meta.chunk_host
    spans = Spans.build(table.q_len, meta.k_starts[table.request], table.k_len, table.k_len - table.q_len + 1, work.device)
    options = AttentionOptions(q.shape[2] ** -0.5)
    attend = partial(cpattn.BACKENDS[backend].attend, q[: meta.num_tokens], _keys_in_order(work, meta), spans, options, q.dtype)
    return Call(lambda: attend()[0], meta.token_index[: meta.num_tokens].to(torch.int64))


def _keys_in_order(work: Work, meta: cpattn.CPMetadata) -> Keys:
    """Of the whole batch, each request's one after another. They are the same for all partitions and ranks."""
    if "keys in order" not in work.kept:
        keys = []
        for new, cached in ((work.k, work.prefix_k), (work.v, work.prefix_v)):
            whole = new.new_empty(len(new) + len(cached), *new.shape[1:])
            whole[meta.extend_key_rows.long()] = new
            whole[meta.prefix_key_rows.long()] = cached
            keys.append(whole)
        work.kept["keys in order"] = Keys(keys[0], keys[1])
    made: Keys = work.kept["keys in order"]
    return made
