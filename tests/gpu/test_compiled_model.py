"""A compiled model over two GPUs."""

from __future__ import annotations

import torch
from programs import compiled_model

from cpattn.testing import ProcessRanks


def test_a_compiled_model_over_nccl() -> None:
    with ProcessRanks(2, timeout=300, transport="nccl") as ranks:
        for outputs in ranks.run(compiled_model.run_on_gpu):
            for compiled, plain in outputs:
                torch.testing.assert_close(compiled, plain, rtol=1e-2, atol=1e-3)  # torch's own backend fuses, and may use TF32
