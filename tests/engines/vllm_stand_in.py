"""Modules in the place of vLLM's, with the interface that cpattn.integrations.vllm is built on and nothing behind it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor


class AttentionBackend:
    forward_includes_kv_cache_update = True
    supported_dtypes = (torch.float16,)
    supported_kv_cache_dtypes = ("auto",)
    get_name = get_impl_cls = get_builder_cls = supports_sliding_window = supports_sink = supports_dcp = supports_pcp = None
    supports_device_cpu_query_lens_mismatch = None


class AttentionImpl:
    can_return_lse_for_decode = supports_dcp = supports_pcp = False

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: Any = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
    ) -> None: ...

    def forward(
        self,
        layer: Any,
        query: Any,
        key: Any,
        value: Any,
        kv_cache: Any,
        attn_metadata: Any,
        output: Any,
        output_scale: Any = None,
        output_block_scale: Any = None,
    ) -> None: ...


class AttentionMetadataBuilder:
    get_cudagraph_support = None

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any) -> None:
        self.device = device

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> None: ...


@dataclass
class CommonAttentionMetadata:
    query_start_loc: Tensor
    query_start_loc_cpu: Tensor
    seq_lens: Tensor
    num_reqs: int
    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    block_table_tensor: Tensor
    slot_mapping: Tensor
    causal: bool | Tensor = True
    encoder_seq_lens: Tensor | None = None
    dcp_local_seq_lens: Tensor | None = None
    positions: Tensor | None = None
    seq_lens_cpu_upper_bound: Tensor | None = None
    mm_req_doc_ranges: Any = None
    rswa_prefix_lens: Tensor | None = None


class Custom:
    """The registry's CUSTOM: the name of a class."""

    def __init__(self) -> None:
        self.path: str | None = None

    def is_overridden(self) -> bool:
        return self.path is not None


# Ranks are threads here: each sets ``group``, where it has one, which vLLM has for a process.
THREAD = threading.local()


def _dcp_group() -> SimpleNamespace:
    return SimpleNamespace(device_group=THREAD.group)


def _dcp_world_size_and_rank(enabled: bool = True) -> tuple[int, int]:
    group = getattr(THREAD, "group", None)
    return (group.size, group.rank) if group is not None and enabled else (1, 0)


@contextmanager
def stand_in() -> Iterator[dict[str, Any]]:
    """vLLM, as far as it is asked for. Yields its modules, to change."""
    contents: dict[str, Any] = {
        "vllm.v1.attention.backend": {
            x.__name__: x for x in (AttentionBackend, AttentionImpl, AttentionMetadataBuilder, CommonAttentionMetadata)
        },
        "vllm.v1.attention.backends.registry": {
            "AttentionBackendEnum": SimpleNamespace(CUSTOM=Custom()),
            "register_backend": lambda member, path: setattr(member, "path", path),
        },
        "vllm.distributed.parallel_state": {
            "get_dcp_group": _dcp_group,
            "get_dcp_world_size_and_rank": _dcp_world_size_and_rank,
        },
    }
    modules: dict[str, Any] = {}
    for name, values in contents.items():
        for parent in [name.rsplit(".", n)[0] for n in range(name.count(".") + 1)]:
            modules.setdefault(parent, ModuleType(parent))
        vars(modules[name]).update(values)
    with patch.dict(sys.modules, modules):
        yield modules
