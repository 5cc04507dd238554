"""vLLM's own modules, imported from its wheel without what it depends on, and without its compiled code.

    python tests/engines/vllm_modules.py FOLDER     # says which of them can be

They are pure Python as far as they say what a step is, and who computes which part of it. What they import besides stands for nothing here.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

# What vLLM needs to be imported, where it is not installed.
_MISSING = (
    "aiohttp cachetools cbor2 cloudpickle cpuinfo msgspec openai openai_harmony prometheus_client psutil requests uvloop urllib3 xxhash zmq"
)
# Of vLLM itself what has to do with requests on their way in, and with images.
_FRONT_END = "vllm.entrypoints vllm.inputs vllm.multimodal vllm.reasoning vllm.renderers vllm.tool_parsers vllm.v1.structured_output"
# What the tests look at.
MODULES = {
    "attention": "vllm.model_executor.layers.attention.attention",
    "backend": "vllm.v1.attention.backend",
    "backend_utils": "vllm.v1.attention.backends.utils",
    "checks": "vllm.v1.worker.cp_utils",
    "forward_context": "vllm.forward_context",
    "groups": "vllm.distributed.parallel_state",
    "pcp": "vllm.v1.worker.gpu.pcp_manager",
    "registry": "vllm.v1.attention.backends.registry",
    "specs": "vllm.v1.kv_cache_interface",
    "steps": "vllm.v1.worker.gpu.attn_utils",
    "tensors": "vllm.utils.torch_utils",
    "worker": "vllm.v1.worker.utils",
}


class _StandIns(MetaPathFinder, Loader):
    """Gives modules of which every attribute is there."""

    def __init__(self) -> None:
        self._names = [*_FRONT_END.split(), *(name for name in _MISSING.split() if PathFinder.find_spec(name) is None)]

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        is_one = any(fullname == name or fullname.startswith(f"{name}.") for name in self._names)
        return ModuleSpec(fullname, self, is_package=True) if is_one else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = MagicMock(name=spec.name)
        module.__path__, module.__name__, module.__spec__ = [], spec.name, spec
        if spec.name == "msgspec":
            module.Struct = _Struct
        return module

    def exec_module(self, module: ModuleType) -> None: ...


class _Struct:
    """Stands for the base of vLLM's messages."""

    def __init_subclass__(cls, **options: Any) -> None: ...


def import_vllm(folder: Path) -> dict[str, ModuleType]:
    """The modules of ``MODULES``. They stay imported, so that tests with them are run by themselves."""
    import transformers  # noqa: F401 # before what it looks for is made up

    sys.path.insert(0, str(folder))
    sys.meta_path.insert(0, _StandIns())
    return {name: importlib.import_module(module) for name, module in MODULES.items()}


if __name__ == "__main__":
    for found in import_vllm(Path(sys.argv[1])).values():
        print(found.__name__)
