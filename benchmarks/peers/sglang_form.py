"""SGLang's form of zigzag context parallelism, written anew: K and V gathered apart, split and concatenated into order, and two
launches a rank, one for each half of the zigzag."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from peers.varlen import Lengths, attention
from peers.work import Call, Unserved, Work, starts

# The name that torch has for it, from 2.13 on and before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def sglang_form(work: Work) -> Call:
    """Rows lie as there: the front blocks of all requests, then the back blocks, then padding. A prefix lies in one pool with room
    for the new keys, which are copied there; without one the launches read what was concatenated."""
    num_blocks = 2 * work.size
    if min(work.extends) < num_blocks:
        raise Unserved(f"a request of less than {num_blocks} new tokens is not split over {work.size} ranks")
    # Of each request; the remainder goes to the first blocks.
    blocks = [[extend // num_blocks + (i < extend % num_blocks) for i in range(num_blocks)] for extend in work.extends]
    halves = [(rank, num_blocks - 1 - rank) for rank in range(work.size)]
    held = [sum(lengths[block] for block in half for lengths in blocks) for half in halves]
    rows = max(held)

    def padded(x: Tensor) -> Tensor:
        return torch.cat([x[tokens], x.new_zeros(rows - len(tokens), *x.shape[1:])])

    def token_range(request: int, block: int) -> Tensor:
        begin = token_starts[request] + sum(blocks[request][:block])
        return torch.arange(begin, begin + blocks[request][block], device=work.device)

    token_starts = starts(work.extends)
    tokens = torch.cat([token_range(request, block) for block in halves[work.rank] for request in range(len(blocks))])
    q, k, v = (padded(x) for x in (work.q, work.k, work.v))

    # The pieces of what is gathered, padding included, and those of the batch in order.
    sizes: list[int] = []
    piece_of: dict[tuple[int, int], int] = {}
    for half, count in zip(halves, held, strict=True):
        for block in half:
            for request, lengths in enumerate(blocks):
                piece_of[request, block] = len(sizes)
                sizes.append(lengths[block])
        sizes.append(rows - count)
    order = [piece_of[request, block] for request in range(len(blocks)) for block in range(num_blocks)]

    key_starts = starts(prefix + extend for prefix, extend in work.batch)
    pools: list[Tensor] | list[None] = [None, None]
    slots = torch.cat([torch.arange(key_starts[i] + p, key_starts[i + 1], device=work.device) for i, p in enumerate(work.prefixes)])
    if any(work.prefixes):
        cached = torch.cat([torch.arange(key_starts[i], key_starts[i] + p, device=work.device) for i, p in enumerate(work.prefixes)])
        pools = [x.new_zeros(key_starts[-1], *x.shape[1:]).index_copy_(0, cached, x) for x in (work.prefix_k, work.prefix_v)]

    def in_order(x: Tensor, pool: Tensor | None) -> Tensor:
        gathered = x.new_empty(work.size * rows, *x.shape[1:])
        _all_gather(gathered, x)
        pieces = torch.split(gathered, sizes)
        whole = torch.cat([pieces[i] for i in order])
        return whole if pool is None else pool.index_copy_(0, slots, whole)

    def launch(block: int) -> Lengths:
        queries = [lengths[block] for lengths in blocks]
        keys = [prefix + sum(lengths[: block + 1]) for prefix, lengths in zip(work.prefixes, blocks, strict=True)]
        return Lengths(work.int32(starts(queries)), work.int32(key_starts), max(queries), max(keys), work.int32(keys))

    launches = [launch(block) for block in halves[work.rank]]
    fronts = sum(lengths[work.rank] for lengths in blocks)
    queries = [q[:fronts], q[fronts : len(tokens)]]

    def run() -> Tensor:
        keys, values = (in_order(x, pool) for x, pool in zip((k, v), pools, strict=True))
        return torch.cat([attention(part, keys, values, launch)[0] for part, launch in zip(queries, launches, strict=True)])

    return Call(run, tokens)
