"""Two steps of vLLM through its backend ``CUSTOM`` on each rank of a group, over the stand-in for vLLM; on a CPU or a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import cpattn
from cpattn.integrations import vllm as cpattn_vllm
from cpattn.integrations.vllm.pages import FP8
from cpattn.testing import oracle_attention, relative_rmse, run_loopback, single_device_bound
from cpattn.transports.transport import Transport
from engines import vllm_stand_in

# A decode, a chunk in the midst of a prompt, a request of one token, a prompt, and a request with nothing new.
BATCH = [(40, 1), (24, 9), (0, 1), (0, 21), (7, 0)]
HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 8, 2, 16, 4
SCALE = 0.3
PREFIXES = [(0, prefix) for prefix, _ in BATCH]
TOTALS = [prefix + extend for prefix, extend in BATCH]
ENDS = np.cumsum(TOTALS)
FIRST_ROWS = torch.cat([torch.arange(end - p - n, end - n) for end, (p, n) in zip(ENDS, BATCH, strict=True)])
ROWS = torch.cat([torch.arange(end - n, end) for end, (_, n) in zip(ENDS, BATCH, strict=True)])
CONFIG = SimpleNamespace(speculative_config=None, parallel_config=SimpleNamespace(cp_kv_cache_interleave_size=2))


def common_of(batch: list[tuple[int, int]], size: int, rank: int, table: Tensor, **more: Any) -> Any:
    """vLLM's metadata of a step."""
    owner = cpattn.Striped(2) if size > 1 else None
    meta = cpattn.build_metadata(batch, size, rank, table.device, owner=owner, queries="all" if size > 1 else "rows")
    return vllm_stand_in.CommonAttentionMetadata(**cpattn_vllm.common_fields(meta, table, BLOCK_SIZE, **more))


def table_of(batch: list[tuple[int, int]]) -> Tensor:
    return torch.randperm(80)[: len(batch) * 12].reshape(len(batch), 12).int()


def check_steps(backend: Any, size: int, device: str, dtype: torch.dtype, **layer: Any) -> None:
    """Compares a step that fills the prefixes, and the batch over them, on all ranks with the oracle."""
    total = sum(TOTALS)
    q, k, v = (torch.randn(total, heads, HEAD_DIM, device=device, dtype=dtype) for heads in (HEADS, KV_HEADS, KV_HEADS))
    table = table_of(BATCH).to(device)
    scales = SimpleNamespace(_k_scale=torch.tensor(0.5, device=device), _v_scale=torch.tensor(0.25, device=device))
    outs = run_loopback(lambda group: _steps_on_a_rank(backend, group, q, k, v, table, scales, layer), size)
    stored = FP8.get(layer.get("kv_cache_dtype", "auto"))
    if stored is not None:
        k, v = ((x / scale).to(stored).to(dtype) * scale for x, scale in ((k, scales._k_scale), (v, scales._v_scale)))
    window, softcap = layer.get("sliding_window"), layer.get("logits_soft_cap")
    whole = [(0, total) for total in TOTALS]
    expected, lse = oracle_attention(q.cpu(), k.cpu(), v.cpu(), whole, scale=SCALE, window=window, softcap=softcap)
    for step, rows in enumerate((FIRST_ROWS, ROWS)):
        out = torch.cat([rank[step] for rank in outs], dim=1).cpu()
        assert relative_rmse(out, expected[rows]) <= single_device_bound(dtype, lse[rows])


def _steps_on_a_rank(
    backend: Any, group: Transport, q: Tensor, k: Tensor, v: Tensor, table: Tensor, scales: Any, layer: dict[str, Any]
) -> list[Tensor]:
    vllm_stand_in.THREAD.group = group
    builder = backend.get_builder_cls()(SimpleNamespace(dcp_sharded=True), ["layer"], CONFIG, q.device)
    heads = q.shape[1] // group.size
    impl = backend.get_impl_cls()(heads, HEAD_DIM, SCALE, KV_HEADS, **layer)
    kv_cache = torch.full((80, KV_HEADS, BLOCK_SIZE, 2 * HEAD_DIM), torch.nan, device=q.device, dtype=q.dtype)
    if impl.kv_cache_dtype in FP8:
        kv_cache = kv_cache.to(FP8[impl.kv_cache_dtype]).view(torch.uint8)
    outs = []
    for batch, rows in ((PREFIXES, FIRST_ROWS), (BATCH, ROWS)):
        common = common_of(batch, group.size, group.rank, table, num_tokens=len(rows) + 3)
        step, padded = builder.build(0, common), torch.cat([rows, rows[:3]]).to(q.device)
        mine = q[padded].chunk(group.size, dim=1)[group.rank]
        output = torch.full_like(mine, -7.0, memory_format=torch.contiguous_format)
        impl.do_kv_cache_update(scales, k[padded], v[padded], kv_cache, common.slot_mapping)
        assert impl.forward(scales, mine, k[padded], v[padded], kv_cache, step, output) is output
        assert (output[len(rows) :] == -7).all()
        outs.append(output[: len(rows)])
    return outs
