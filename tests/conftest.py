from __future__ import annotations

import multiprocessing
import os

import pytest
import torch
from devices.gpu_workers import rotated

# The tensors here are small, and many ranks run as threads of one process: a thread pool under each would only contend.
torch.set_num_threads(1)

# Tests use the first GPU, and those of several ranks one each: each worker of pytest-xdist has another one first.
if torch.cuda.device_count() > 1 and "PYTEST_XDIST_WORKER" in os.environ:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    os.environ["CUDA_VISIBLE_DEVICES"] = rotated(visible, os.environ["PYTEST_XDIST_WORKER"])

# Kernels run compiled where there is a GPU, else in Triton's interpreter, which must be asked for before anything imports
# triton, as transformers may.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    # torch's compiler would start processes to compile in, which takes longer than the few kernels here.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    # Processes of ranks come from one that has imported what they need, which takes each of them two seconds of a core.
    multiprocessing.set_start_method("forkserver")
    multiprocessing.set_forkserver_preload(["cpattn.testing"])

# The files that take longest, the longest first. Of several processes one would else run such a file alone at the end.
LONGEST = [
    "whole_graphs", "ragged_attention", "gloo_failures", "gloo", "docs", "operators", "pictures", "fuzz", "compile", "mini_engine",
    "check_backend", "plan", "check_triton", "hf_logits", "process_parts", "failed_calls", "striped", "latent_attention", "cli",
    "paged_attention", "ranks", "first_strategy", "hf_example",
]  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {f"test_{name}.py": n for n, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))
