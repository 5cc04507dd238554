"""shard and unshard on the CPU, beside torch.split and torch.cat of the pieces.

python benchmarks/bench_shard.py
"""

from __future__ import annotations

import numpy as np
import torch
from timing import interleaved, percentiles, write_report
from torch import Tensor

import cpattn
from cpattn.transports.transfer import Work

NUM_REQUESTS, CP_SIZE, CP_RANK = 64, 8, 3


class FilledCommunicator(cpattn.Communicator):
    """Its gathers take no time: the buffer of ``unshard`` holds what the ranks would have sent."""

    def _all_gather(self, out: Tensor, x: Tensor) -> Work:
        return Work(lambda: None)

    def _shift(self, out: Tensor, x: Tensor, by: int) -> Work:
        raise NotImplementedError

    def _all_to_all(self, out: Tensor, x: Tensor) -> Work:
        raise NotImplementedError


def split_and_cat(x: Tensor, sizes: list[int], order: list[int]) -> Tensor:
    """What one writes without an index: cut into all pieces, put some of them together again."""
    pieces = torch.split(x, sizes)
    return torch.cat([pieces[i] for i in order])


def main() -> None:
    rng = np.random.default_rng(0)
    rows = []
    for mean_extend in (64, 900):
        batch = [(0, int(extend)) for extend in rng.integers(1, 2 * mean_extend, NUM_REQUESTS)]
        plan = cpattn.plan(batch, CP_SIZE)
        meta = plan.metadata(CP_RANK)
        # Pieces of the original order, and of the gathered one: each rank's chunks, then its padding.
        sizes = [chunk.length for chunk in plan.chunks]
        mine = [i for i, chunk in enumerate(plan.chunks) if chunk.rank == CP_RANK]
        gathered_sizes: list[int] = []
        position = [0] * len(sizes)
        for rank in range(CP_SIZE):
            for i, chunk in enumerate(plan.chunks):
                if chunk.rank == rank:
                    position[i] = len(gathered_sizes)
                    gathered_sizes.append(chunk.length)
            gathered_sizes.append(plan.rows - plan.rank_tokens[rank])
        for name, shape, dtype in (
            ("token ids, int64", (), torch.int64),
            ("RoPE table, [64] fp32", (64,), torch.float32),
            ("hidden states, [4096] bf16", (4096,), torch.bfloat16),
        ):
            x = torch.randint(0, 1000, (plan.num_tokens, *shape)).to(dtype)
            communicator = FilledCommunicator(CP_RANK, CP_SIZE)
            gathered = communicator.buffer("unshard", (CP_SIZE * plan.rows, *shape), dtype, x.device)
            gathered.copy_(torch.cat([cpattn.shard(x, plan.metadata(rank)) for rank in range(CP_SIZE)]))
            local = cpattn.shard(x, meta)
            assert torch.equal(local[: meta.num_tokens], split_and_cat(x, sizes, mine))
            assert torch.equal(cpattn.unshard(local, meta, group=communicator), x)
            assert torch.equal(split_and_cat(gathered, gathered_sizes, position), x)
            times = interleaved(
                {
                    "shard": lambda x=x, meta=meta: cpattn.shard(x, meta),  # type: ignore[misc]
                    "shard by pieces": lambda x=x, sizes=sizes, mine=mine: split_and_cat(x, sizes, mine),  # type: ignore[misc]
                    "unshard": lambda y=local, m=meta, c=communicator: cpattn.unshard(y, m, group=c),  # type: ignore[misc]
                    "unshard by pieces": lambda g=gathered, s=gathered_sizes, o=position: split_and_cat(g, s, o),  # type: ignore[misc]
                },
                seconds=3.0,
            )
            for call in ("shard", "unshard"):
                ratio = np.median(times[f"{call} by pieces"]) / np.median(times[call])
                size = f"{(local if call == 'shard' else x).nbytes / 1e6:,.3g}"
                rows.append(
                    [
                        call,
                        f"{plan.num_tokens:,}",
                        name,
                        size,
                        percentiles(times[f"{call} by pieces"]),
                        percentiles(times[call]),
                        f"{ratio:.1f}",
                    ]
                )
    write_report(
        "shard_cpu",
        f"shard and unshard, {NUM_REQUESTS} requests, cp_size {CP_SIZE}",
        ["call", "tokens", "rows of", "MB moved", "split + cat, us", "cpattn, us", "ratio"],
        rows,
        "The lists of piece sizes and orders are made beforehand, as cpattn's index is. unshard's gather is taken as done, on both sides. "
        "What wins is one gather in place of a thousand pieces; where tens of megabytes are moved both are bound by memory, and alike.",
    )


if __name__ == "__main__":
    main()
