"""SGLang's own files on a machine without a GPU and without what SGLang depends on: those that are tested are real, and what they import
stands in.

``make test-engines`` installs its wheel into a folder of its own, which ``CPATTN_SGLANG`` names.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

from cpattn.testing import oracle_attention

# Run as SGLang has them. All else of it stands in.
REAL = frozenset(
    f"sglang.srt.{name}"
    for name in (
        "environ",
        "layers.attention.base_attn_backend",
        "layers.attention.flashattention_backend",
        "layers.attention.graph_utils",
        "layers.cp.base",
        "layers.cp.padding",
        "layers.cp.utils",
        "layers.cp.zigzag",
        "layers.quantization.fp4_kv_cache_quant_method",
        "layers.radix_attention",
        "mem_cache.base_swa_memory_pool",
        "mem_cache.layout.paged_view",
        "mem_cache.memory_pool",
        "mem_cache.swa_memory_pool",
        "model_executor.forward_batch_deepseek_mha_mixin",
        "model_executor.forward_batch_info",
        "plugins",
        "plugins.hook_registry",
    )
)
# Of its dependencies, what those files import themselves.
MISSING = ("sgl_kernel",)


class Rank(threading.local):
    """What SGLang keeps in globals of a process, for each thread, which is a rank here."""

    parallel: Any
    backend: Any
    kernel_calls: int = 0


RANK = Rank()


def _no() -> bool:
    return False


def _stand_ins(device: str) -> dict[str, dict[str, Any]]:
    """What the real files need of the others; whatever else they name is a MagicMock."""
    devices = ("is_cuda", "is_npu", "is_cpu", "is_xpu", "is_hip", "is_gfx95_supported", "cpu_has_amx_support")
    utils = {"ceil_align": lambda n, to: -(-n // to) * to, **dict.fromkeys(devices, _no)}
    config = SimpleNamespace(
        deterministic=SimpleNamespace(enable_deterministic_inference=False),
        is_embedding=False,
        chunked_prefill_size=None,
        disable_radix_cache=False,
        speculative_eagle_topk=None,
        speculative_num_draft_tokens=None,
        device=device,
    )
    return {
        "sglang.kernels.kernel_api_logging": {"debug_kernel_api": lambda function: function},
        "sglang.kernels.ops.attention.flash_attention": {"flash_attn_with_kvcache": flash_attention},
        "sglang.kernels.ops.quantization.fp8_kernel": {"is_fp8_fnuz": _no},
        "sglang.srt.layers.attention.kv_shard_hooks": {"get_kv_shard_pool": lambda pool: None},
        "sglang.srt.layers.dp_attention": {"is_allocation_symmetric": _no, "set_local_dp_buffer_len": lambda rows: None},
        "sglang.srt.mem_cache.utils": {"maybe_init_custom_mem_pool": lambda device: (False, None, None)},
        "sglang.srt.model_executor.forward_context": {
            "get_attn_backend": lambda: RANK.backend,
            "get_token_to_kv_pool": lambda: RANK.backend.token_to_kv_pool,
            "get_req_to_token_pool": lambda: RANK.backend.req_to_token_pool,
        },
        "sglang.srt.model_executor.runner": {"get_is_capture_mode": _no},
        "sglang.srt.model_executor.runner_backend_utils.breakable_cuda_graph": {
            "is_in_breakable_cuda_graph": _no,
            "eager_on_graph": lambda function: function,
        },
        "sglang.srt.model_executor.runner_utils.prefill_graph": {
            "is_in_full_prefill_graph": _no,
            "is_in_prefill_graph_scope": _no,
        },
        "sglang.srt.platforms": {"current_platform": SimpleNamespace(is_cuda_alike=_no)},
        "sglang.srt.runtime_context": {
            "get_parallel": lambda: RANK.parallel,
            "attention_backends": lambda: ("fa3", "fa3"),
            **{f"get_{bag}": lambda: config for bag in ("device", "exec", "memory", "model", "schedule", "spec")},
        },
        "sglang.srt.utils": utils,
        "sglang.srt.utils.common": utils,
    }


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds SGLang's real files, and makes the rest."""

    def __init__(self, folder: Path, device: str) -> None:
        self._folder = folder
        self._stand_ins = _stand_ins(device)

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> Any:
        if name.split(".")[0] not in ("sglang", *MISSING):
            return None
        if name not in REAL:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        file = self._folder.joinpath(*name.split("."))
        if file.is_dir():
            return importlib.util.spec_from_file_location(name, file / "__init__.py", submodule_search_locations=[str(file)])
        return importlib.util.spec_from_file_location(name, file.with_suffix(".py"))

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> Any:
        if any(name.startswith(f"{spec.name}.") for name in REAL):
            # A package: what it is asked for are its modules.
            return None
        module = MagicMock(name=spec.name, __path__=[], __spec__=spec, __file__=None)
        module.__name__ = spec.name
        for name, value in self._stand_ins.get(spec.name, {}).items():
            setattr(module, name, value)
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


def folder() -> Path:
    """Where SGLang's package is; skips the test if it is nowhere."""
    given = os.environ.get("CPATTN_SGLANG")
    if not given:
        pytest.skip("SGLang's files are not here: make test-engines fetches them")
    found = Path(given)
    if not (found / "sglang").is_dir():
        pytest.fail(f"CPATTN_SGLANG={given}, but there is no {found / 'sglang'}")
    return found


@contextmanager
def standing_in(device: str = "cpu") -> Iterator[str]:
    """Within it, ``import sglang...`` gives the real files with stand-ins around them. Yields the release."""
    finder = _Finder(folder(), device)
    (metadata,) = folder().glob("sglang-*.dist-info")
    release = metadata.name.removeprefix("sglang-").removesuffix(".dist-info")
    sys.meta_path.insert(0, finder)
    try:
        importlib.import_module("sglang").__version__ = release  # type: ignore[attr-defined]
        yield release
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.split(".")[0] in ("sglang", *MISSING)]:
            del sys.modules[name]


def flash_attention(**given: Any) -> Tensor:
    """In the place of FlashAttention's kernel over pages, which SGLang's backend calls: the oracle, in q's dtype, or bf16 of fp8."""
    RANK.kernel_calls += 1
    q, cache_seqlens, cu_seqlens_q = given["q"], given["cache_seqlens"].tolist(), given["cu_seqlens_q"].tolist()
    assert given["causal"]
    left, _ = given["window_size"]
    outs = []
    for line, begin, end, keys in zip(given["page_table"], cu_seqlens_q[:-1], cu_seqlens_q[1:], cache_seqlens, strict=True):
        assert end - begin <= min(given["max_seqlen_q"], keys)
        page_size = given["k_cache"].shape[1]
        pages = line[: -(-keys // page_size)].long()
        k, v = (given[f"{x}_cache"][pages].flatten(0, 1)[:keys] for x in "kv")
        prefix = keys - (end - begin)
        out, _ = oracle_attention(
            q[begin:end],
            k[prefix:],
            v[prefix:],
            [(prefix, end - begin)],
            prefix_k=k[:prefix],
            prefix_v=v[:prefix],
            scale=given["softmax_scale"],
            window=left + 1 if left >= 0 else None,
            softcap=given["softcap"] or None,
            sinks=given.get("sinks"),
        )
        outs.append(out)
    return torch.cat(outs).to(q.dtype if q.dtype.itemsize > 1 else torch.bfloat16)


class Coordinator:
    """SGLang's group of ranks, over one end of a loopback group.

    Attributes:
        device_group: what cpattn takes.
        gathers: how many messages SGLang itself has sent.
    """

    def __init__(self, transport: Any) -> None:
        self.device_group = transport
        self.gathers = 0

    def all_gather_into_tensor(self, out: Tensor, x: Tensor) -> None:
        self.gathers += 1
        self.device_group.all_gather(out, x.contiguous()).wait()


if __name__ == "__main__":
    # The few files alone, to take them to another machine: python tests/engines/sglang_standin.py .venv-engines/sglang TO
    source, to = map(Path, sys.argv[1:])
    for name in REAL:
        file = source.joinpath(*name.split("."))
        file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
        target = to / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    for metadata in source.glob("sglang-*.dist-info"):
        (to / metadata.name).mkdir(exist_ok=True)
