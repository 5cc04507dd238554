"""What ranks on GPUs run over pages that each of them holds whole: functions of an importable module, so that a process can be sent their
names. All is compared with keys that are gathered first, written, and attended to then."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import cpattn

BUCKET = cpattn.Bucket(max_requests=12, max_rows=2560, max_chunks=24, max_seqlen=2048)
# Nothing is needed of others; some keys are; nearly all are; and fewer requests than ranks.
BATCHES: list[tuple[list[tuple[int, int]], str]] = [
    ([(7, 64)] * 8, "whole"),
    ([(9, 1500), *[(9, 400)] * 9], "whole"),
    ([(0, 777), (640, 300), (0, 3), (997, 1), (64, 0)], "zigzag"),
    ([(5, 1)], "zigzag"),
]
_PAGE, _PAGES = 16, 2048


class _Layer:
    """This rank's inputs and pages, which are NaN but for prefixes."""

    def __init__(self, rows: int, requests: int) -> None:
        self.inputs = [torch.randn(rows, heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (8, 2, 2)]
        self.pages = torch.zeros(2, _PAGES, _PAGE, 2, 64, device="cuda", dtype=torch.bfloat16)
        width = BUCKET.max_seqlen // _PAGE
        self.table = torch.randperm(_PAGES, device="cuda").int()[: requests * width].view(requests, width)
        self.cache = cpattn.PagedKV(self.pages[0], self.pages[1], self.table)

    def renew(self, plan: cpattn.Plan) -> None:
        """Other inputs, and pages as they are before a call."""
        for x in self.inputs:
            x.normal_()
        torch.manual_seed(1)
        prefixes = torch.randn_like(self.pages)
        torch.manual_seed(torch.seed() + dist.get_rank())
        self.pages.fill_(torch.nan)
        for request, (prefix, _) in enumerate(plan.batch):
            position = torch.arange(prefix, device="cuda")
            page = self.table[request][position // _PAGE].long()
            self.pages[:, page, position % _PAGE] = prefixes[:, request, 0, :, :][:, None]

    def expected(self, meta: cpattn.CPMetadata, window: int | None) -> tuple[Tensor, Tensor]:
        """The result, and the pages, of the three pieces of a call."""
        pages, group = self.pages.clone(), cpattn.transport(kind="collectives")
        cache = cpattn.PagedKV(pages[0], pages[1], self.table[: max(1, len(meta.plan.batch))])
        q, k, v = (x[: meta.rows] for x in self.inputs)
        slots = cpattn.slot_mapping(meta, cache.page_table, _PAGE)
        cpattn.write_kv(*cpattn.gather_kv(k, v, meta, group=group), cache, slots)
        return cpattn.attend(q, cache, meta, backend="triton", window=window)[: meta.num_tokens], pages

    def agrees(self, out: Tensor, expected: tuple[Tensor, Tensor]) -> bool:
        """To the bit."""
        return all(torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)) for x, y in zip((out, self.pages), expected, strict=True))


def replay_into_pages(kind: Any, window: int | None, bucket: bool) -> list[bool]:
    """Graphs of two calls, one after the other over the same inputs, replayed over other inputs: whether each result, and what each leaves
    in the pages, is right. With a bucket one graph serves all batches."""
    size, rank, group = dist.get_world_size(), dist.get_rank(), cpattn.transport(kind=kind)
    plans = [cpattn.plan(batch, size, partition=partition) for batch, partition in BATCHES]
    same: list[bool] = []
    graph, layer, meta, out = None, None, None, None
    for plan in [*plans, *plans] if bucket else plans:
        if not bucket or meta is None or layer is None:
            meta = plan.metadata(rank, "cuda", bucket=BUCKET if bucket else None)
            layer, graph = _Layer(meta.rows, BUCKET.max_requests if bucket else len(plan.batch)), None
        else:
            meta.copy_(plan)

        def call(layer: _Layer = layer, meta: cpattn.CPMetadata = meta) -> Tensor:
            q, k, v = layer.inputs
            return cpattn.cp_attention(
                q, k, v, meta, group=group, kv_cache=layer.cache, strategy="all_gather", backend="triton", window=window
            )

        if graph is None:
            layer.renew(plan)
            expected = layer.expected(plan.metadata(rank, "cuda"), window)
            same.append(layer.agrees(call()[: meta.num_tokens], expected))
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call()
                out = call()
        for turn in range(2):
            layer.renew(plan)
            expected = layer.expected(plan.metadata(rank, "cuda"), window)
            if rank == turn % size:
                # Ranks need not come at the same time.
                torch.cuda._sleep(20_000_000)  # type: ignore[no-untyped-call]
            graph.replay()
            assert out is not None
            same.append(layer.agrees(out[: meta.num_tokens], expected))
    return same
