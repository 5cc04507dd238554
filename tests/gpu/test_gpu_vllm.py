"""The backend that vLLM's CUSTOM stands for on a GPU, over the stand-in for vLLM: ranks are threads that share it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engines import vllm_stand_in
from engines.vllm_programs import check_steps

from cpattn.integrations.vllm import custom


@pytest.mark.parametrize(
    ("size", "layer"), [(1, {}), (2, {}), (2, {"sliding_window": 5, "logits_soft_cap": 3.0}), (1, {"kv_cache_dtype": "fp8"})], ids=str
)
def test_the_backend_is_exact(size: int, layer: dict[str, Any]) -> None:
    with vllm_stand_in.stand_in():
        backend = custom.attention_backend.__wrapped__()
    check_steps(backend, size, "cuda", torch.bfloat16, **layer)
