"""The plugin for SGLang over cpattn's own kernels, in SGLang's own classes: as tests/integrations/test_sglang_engine.py, in bf16.

Needs SGLang's files: ``make test-engines`` fetches them, and ``CPATTN_SGLANG=FOLDER`` names where they are.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from engines.sglang_batches import compare_with_oracle, random_case, run_rank
from engines.sglang_standin import standing_in

from cpattn.integrations.sglang.plugin import strategy_over
from cpattn.testing import run_loopback


@pytest.mark.parametrize("pool_class", ["MHATokenToKVPool", "SWAKVPool"])
@pytest.mark.parametrize("seed", range(6))
def test_random_forward_batches(seed: int, pool_class: str) -> None:
    with standing_in("cuda"), torch.inference_mode():
        from sglang.srt.layers.cp import base, zigzag

        base._STRATEGY = strategy_over(zigzag.ZigzagCPStrategy)(cp_size=2)
        case = random_case(seed, 2, head_dim=64).to("cuda", torch.bfloat16)
        ranks = run_loopback(partial(run_rank, case, pool_class=pool_class), size=2)
        assert {(ran.was_split, ran.kernel_calls) for ran in ranks} == {(True, 0)}
        compare_with_oracle(case, ranks)
