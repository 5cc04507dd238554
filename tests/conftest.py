from __future__ import annotations

import torch

# The tensors here are small, and many ranks run as threads of one process: a thread pool under each would only contend.
torch.set_num_threads(1)
