from __future__ import annotations

import os

import torch

# The tensors here are small, and many ranks run as threads of one process: a thread pool under each would only contend.
torch.set_num_threads(1)

# Kernels run compiled where there is a GPU, else in Triton's interpreter, which must be asked for before anything imports
# triton, as transformers may.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Results do not depend on what somebody has tuned; tests of tuning name a file of their own.
os.environ["CPATTN_TILES"] = ""
