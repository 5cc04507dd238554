from __future__ import annotations

import os

import torch
from gpu_workers import rotated

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
