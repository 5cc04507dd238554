"""What ranks that are processes run over memory that they share, without GPUs."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from devices.interpreted_peers import over_files
from inputs.cases import AttentionCase
from references.keys_in_place import in_place_backend

import cpattn
from cpattn.exchange import late_keys
from cpattn.kernels import peer_exchange
from cpattn.kernels.peer_flags import await_messages
from cpattn.keys import Keys
from cpattn.transports.peer_processes import PeerMemoryTransport


def take_turns(folder: Path, cases: list[AttentionCase], turns: list[int]) -> tuple[list[bool], int]:
    """Calls over these cases in turn, each over other keys, of which each rank begins some late, pulls late in some, and brings keys of
    some by the programs of long messages: whether each result is that of collectives; and in how many calls keys came late."""
    draw = random.Random(dist.get_rank())

    def await_and_rest(*given: Any) -> Any:
        are_there = await_messages(*given)
        time.sleep(draw.choice([0.0, 0.05]))
        return are_there

    def call(n: int, group: cpattn.Transport, backend: Any) -> Any:
        case, meta = cases[turns[n]], metas[turns[n]]
        q, k, v = (cpattn.shard(x, meta) * (n + 1) for x in (case.q, case.k, case.v))
        return cpattn.cp_attention(
            q, k, v, meta, group=group, kv_cache=case.prefix, strategy="all_gather", backend=backend, return_lse=True
        )

    with pytest.MonkeyPatch.context() as patch:
        over_files(patch, folder)
        patch.setattr(peer_exchange, "await_messages", await_and_rest)
        peers = PeerMemoryTransport(dist.new_group())
        metas = [case.plan(peers.size, pad_to=4).metadata(peers.rank) for case in cases]
        expected = [call(n, cpattn.transport(kind="collectives"), "reference") for n in range(len(turns))]
        seen: list[Keys] = []
        backend = in_place_backend(seen, waits=True)
        same = []
        for n in range(len(turns)):
            time.sleep(draw.choice([0.0, 0.05]))
            patch.setattr(late_keys, "_SHORT_BYTES", draw.choice([0, 1 << 25]))
            same.append(all(torch.equal(x, y) for x, y in zip(call(n, peers, backend), expected[n], strict=True)))
        cpattn.check(peers)
        return same, sum(keys.arrivals is not None for keys in seen)
