"""Models of transformers over two GPUs: logits, autocast, loss and answers are those of the plain model on one."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
import torch
from programs import hf_cases
from torch import Tensor

import cpattn
from cpattn.testing import ProcessRanks, relative_rmse

# Prime lengths, a single token, none at all.
BATCH = [(0, 61), (0, 1), (0, 0), (0, 3), (0, 37), (0, 2)]
LAST = [60, 61, 64, 101, 103]  # the last token of each request that has one
WITH_TOKENS = [0, 1, 3, 4, 5]


@pytest.fixture(scope="module")
def ranks() -> Iterator[ProcessRanks]:
    with ProcessRanks(2, timeout=240, transport="nccl") as started:
        yield started


@cache
def truth_of(family: str) -> Tensor:
    return hf_cases.plain_logits(hf_cases.model_of(family, torch.float64), hf_cases.token_ids(BATCH), BATCH)


@pytest.mark.parametrize("mode", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3", "gpt_oss"])
def test_logits_and_loss(ranks: ProcessRanks, family: str, mode: str) -> None:
    truth = truth_of(family)
    results = ranks.run(hf_cases.run_on_gpu, family, mode, cpattn.plan(BATCH, 2, pad_to=8))
    for result in results:
        # Sums in another order are another draw of an error of one size.
        bound = 2 * relative_rmse(result["plain logits"], truth)
        assert relative_rmse(result["logits"], truth) <= bound
        assert torch.equal(result["last"][WITH_TOKENS], result["logits"][LAST])
        assert result["last"][2].isnan().all()
        # A loss is off by no more than a logit is: it is their mean, and those of the truth are a few units at most.
        assert abs(result["loss"] - result["plain loss"]) <= bound * truth.abs().max()
        assert torch.equal(result["loss"], results[0]["loss"])
    torch.testing.assert_close(results[0]["share"] + results[1]["share"], results[0]["loss"])


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt_oss"])
def test_answers(ranks: ProcessRanks, family: str) -> None:
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(1, 128, (length,), generator=generator) for length in (113, 1, 5, 13)]
    first, second = ranks.run(hf_cases.generate_on_gpu, family, torch.float32, prompts, 9)
    assert first == second
    assert first["sharded"] == first["replicated"] == first.get("compiled", first["own"]) == first["own"]


def test_answers_in_half_precision(ranks: ProcessRanks) -> None:
    """Rounding may change a token, and all that follow it: the ranks agree all the same."""
    prompts = [torch.arange(1, 100), torch.tensor([7])]
    first, second = ranks.run(hf_cases.generate_on_gpu, "llama", torch.bfloat16, prompts, 9)
    assert first == second
    assert {len(ids) for ids in first["sharded"]} == {108, 10}
