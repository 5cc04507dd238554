"""Building one rank's metadata, beside a plain builder that loops over chunks in Python and fills the same tensors.

python benchmarks/bench_metadata.py
"""

from __future__ import annotations

import numpy as np
import torch
from timing import interleaved, percentiles, write_report
from torch import Tensor

import cpattn

TENSORS = ["chunk_request", "cu_seqlens_q", "k_len", "k_start", "token_index", "position_ids", "restore_index"]


def loop_builder(batch: list[tuple[int, int]], cp_size: int, cp_rank: int) -> dict[str, Tensor]:
    """The same layout and the same tensors, as one would write them down without vectorising anything."""
    num_chunks = 2 * cp_size
    chunk_request, cu_seqlens_q, k_len, k_start = [], [0], [], []
    token_index: list[int] = []
    position_ids: list[int] = []
    rank_rows = [0] * cp_size
    restore = []
    token = key = dealt = 0
    for request, (prefix_len, extend_len) in enumerate(batch):
        base, left_over = divmod(extend_len, num_chunks)
        everyone, some = divmod(left_over, cp_size)
        first_rank = dealt % cp_size
        dealt += extend_len
        start = 0
        for chunk in range(num_chunks):
            rank = min(chunk, num_chunks - 1 - chunk)
            extra = everyone + ((rank - first_rank) % cp_size < some)
            length = base + (chunk // cp_size < extra)
            if length == 0:
                continue
            restore.append((rank, rank_rows[rank], length))
            rank_rows[rank] += length
            if rank == cp_rank:
                chunk_request.append(request)
                cu_seqlens_q.append(cu_seqlens_q[-1] + length)
                k_len.append(prefix_len + start + length)
                k_start.append(key)
                token_index.extend(range(token + start, token + start + length))
                position_ids.extend(range(prefix_len + start, prefix_len + start + length))
            start += length
        token += extend_len
        key += prefix_len + extend_len
    rows = max(rank_rows)
    padding = rows - rank_rows[cp_rank]
    restore_index: list[int] = []
    for rank, row, length in restore:
        restore_index.extend(range(rank * rows + row, rank * rows + row + length))
    lists = [chunk_request, cu_seqlens_q, k_len, k_start, token_index + [-1] * padding, position_ids + [0] * padding, restore_index]
    dtypes = [torch.int64 if name == "position_ids" else torch.int32 for name in TENSORS]
    return {name: torch.tensor(values, dtype=dtype) for name, values, dtype in zip(TENSORS, lists, dtypes, strict=True)}


def cpattn_builder(batch: list[tuple[int, int]], cp_size: int, cp_rank: int) -> dict[str, Tensor]:
    meta = cpattn.build_metadata(batch, cp_size, cp_rank)
    return {name: getattr(meta, name) for name in TENSORS}


def main() -> None:
    rng = np.random.default_rng(0)
    rows = []
    for num_requests in (1, 8, 64, 256):
        batch = list(zip(rng.integers(0, 8192, num_requests).tolist(), rng.integers(1, 1801, num_requests).tolist(), strict=True))
        for cp_size in (4, 8, 64):
            ours, theirs = cpattn_builder(batch, cp_size, 1), loop_builder(batch, cp_size, 1)
            assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in TENSORS)
            times = interleaved(
                {
                    "cpattn": lambda batch=batch, cp_size=cp_size: cpattn_builder(batch, cp_size, 1),  # type: ignore[misc]
                    "tables": lambda batch=batch, cp_size=cp_size: cpattn.build_metadata(batch, cp_size, 1),  # type: ignore[misc]
                    "loop": lambda batch=batch, cp_size=cp_size: loop_builder(batch, cp_size, 1),  # type: ignore[misc]
                },
                seconds=1.0,
            )
            ratio = np.median(times["loop"]) / np.median(times["cpattn"])
            rows.append(
                [str(num_requests), str(cp_size), *(percentiles(times[name]) for name in ("loop", "cpattn", "tables")), f"{ratio:.1f}"]
            )
    write_report(
        "metadata_cpu",
        "Building one rank's metadata",
        ["requests", "cp_size", "Python loop, us", "cpattn, us", "cpattn, per-chunk tables only, us", "loop / cpattn"],
        rows,
        "From the list of (prefix_len, extend_len) to all tensors of one rank, token-level ones included; extend 1 to 1,800 tokens "
        "(uniform), prefix 0 to 8,191. Both builders' tensors are compared before timing.",
    )


if __name__ == "__main__":
    main()
