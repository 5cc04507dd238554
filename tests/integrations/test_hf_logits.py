"""Models of transformers with their sequence over several ranks: the logits are those of the plain model."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import pytest
import torch
from programs import hf_cases
from torch import Tensor
from torch._dynamo.utils import counters
from torch.library import opcheck

import cpattn
from cpattn.integrations import transformers as cpattn_hf
from cpattn.testing import relative_rmse, run_loopback

# Prime lengths, a single token, none at all, and fewer tokens than ranks.
BATCH = [(0, 29), (0, 1), (0, 0), (0, 3), (0, 13), (0, 2)]
LAST = [28, 29, 32, 45, 47]  # the last token of each request that has one
WITH_TOKENS = [0, 1, 3, 4, 5]


@cache
def truth_of(family: str) -> Tensor:
    return hf_cases.plain_logits(hf_cases.model_of(family, torch.float64), hf_cases.token_ids(BATCH), BATCH)


@cache
def bound_of(family: str, dtype: torch.dtype) -> float:
    """Twice the plain model's own error against float64: sums in another order are another draw of an error of one size."""
    plain = hf_cases.plain_logits(hf_cases.model_of(family, dtype), hf_cases.token_ids(BATCH), BATCH)
    return 2 * relative_rmse(plain, truth_of(family))


def check_logits(results: list[tuple[Tensor, Tensor, Tensor]], family: str, dtype: torch.dtype = torch.float32) -> None:
    truth, bound = truth_of(family), bound_of(family, dtype)
    for everything, *lasts in results:
        assert relative_rmse(everything, truth) <= bound
        for last in lasts:
            assert last.shape == (len(BATCH), truth.shape[1])
            assert relative_rmse(last[WITH_TOKENS], truth[LAST]) <= bound
            assert last[2].isnan().all()


# Over real processes it runs in examples/hugging_face.py, which test_hf_example.py starts.
@pytest.mark.parametrize("strategy", ["all_gather", "ring"])
@pytest.mark.parametrize("cp_size", [1, 2, 4])
@pytest.mark.parametrize("family", hf_cases.CONFIGS)
def test_logits_are_the_plain_models(family: str, cp_size: int, strategy: str) -> None:
    cpattn_hf.register()
    # Made before the threads are: both would seed the one generator that there is.
    hf_cases.model_of(family)
    # Many padding rows with one of the strategies: of 4 ranks, each has 12 tokens or so in 32 rows.
    plan = cpattn.plan(BATCH, cp_size, pad_to=32 if strategy == "all_gather" else 1)
    run = partial(hf_cases.sharded_logits, family, torch.float32, plan, strategy)
    check_logits(run_loopback(lambda group: run(group, group.rank), cp_size), family)


@pytest.mark.parametrize(("family", "partition"), [("llama", "contiguous"), ("llama", "whole"), ("gemma2", "contiguous")])
def test_half_precision(family: str, partition: str) -> None:
    cpattn_hf.register()
    plan = cpattn.plan(BATCH, 2, partition=partition)
    # Made before the threads are: both would seed the one generator that there is.
    hf_cases.model_of(family, torch.bfloat16)
    results = run_loopback(lambda group: hf_cases.sharded_logits(family, torch.bfloat16, plan, "auto", group, group.rank), 2)
    check_logits(results, family, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("family", hf_cases.CONFIGS)
def test_under_autocast(family: str, dtype: torch.dtype) -> None:
    cpattn_hf.register()
    truth, plan, model = truth_of(family), cpattn.plan(BATCH, 2), hf_cases.model_of(family, torch.float32)
    with torch.autocast("cpu", dtype):
        plain = hf_cases.plain_logits(model, hf_cases.token_ids(BATCH), BATCH)
        results = run_loopback(lambda group: hf_cases.sharded_logits(family, torch.float32, plan, "auto", group, group.rank), 2)
    for everything, *_ in results:
        assert everything.dtype == plain.dtype
        assert relative_rmse(everything, truth) <= 2 * relative_rmse(plain, truth)


def test_float64_is_not_cast_under_autocast() -> None:
    cpattn_hf.register()
    plan = cpattn.plan(BATCH, 1)
    with torch.autocast("cpu", torch.bfloat16):
        plain = hf_cases.plain_logits(hf_cases.model_of("llama", torch.float64), hf_cases.token_ids(BATCH), BATCH)
        ours, *_ = hf_cases.sharded_logits("llama", torch.float64, plan, "auto", None, 0)
    assert relative_rmse(ours, plain) <= 1e-6


def test_a_compiled_model() -> None:
    cpattn_hf.register()
    model = hf_cases.new_model("gemma2")
    model.set_attn_implementation("cpattn")
    compiled: Any = torch.compile(model, backend="eager")
    input_ids, meta = hf_cases.token_ids(BATCH), cpattn.build_metadata(BATCH, 1, 0)
    with torch.inference_mode(), cpattn_hf.context_parallel(compiled, meta) as cp:
        logits = cp.gather(compiled(**cp.inputs(input_ids)).logits)
    assert relative_rmse(logits, truth_of("gemma2")) <= bound_of("gemma2", torch.float32)


def test_a_model_compiles_to_one_graph() -> None:
    """One with layers with and without a window, and with sinks."""
    cpattn_hf.register()
    model = hf_cases.new_model("gpt_oss")
    model.set_attn_implementation("cpattn")
    torch._dynamo.reset()
    counters.clear()
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    graphs = []
    for length in (9, 14, 11):
        input_ids, meta = hf_cases.token_ids([(0, length)]), cpattn.build_metadata([(0, length)], 1, 0)
        with torch.inference_mode(), cpattn_hf.context_parallel(compiled, meta) as cp:
            logits = cp.gather(compiled(**cp.inputs(input_ids)).logits)
            assert torch.equal(logits, cp.gather(model(**cp.inputs(input_ids)).logits))
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [1, 2, 2]
    # What is looked at outside of graphs is looked at where they run.
    with torch.inference_mode(), cpattn_hf.context_parallel(compiled, meta) as cp:
        inputs = cp.inputs(input_ids)
        inputs["attention_mask"] = inputs["attention_mask"].clone()
        with pytest.raises(cpattn_hf.ContextError, match=r"an attention_mask of shape \(1, 11\), not with that of cp.inputs"):
            compiled(**inputs)
        with pytest.raises(Exception, match=r"cpattn runs outside of graphs.*compile without fullgraph=True"):
            compiled(**cp.inputs(input_ids), labels=input_ids)
        for called in (compiled, model):
            other = cpattn.forward_context(cpattn.build_metadata([(0, 5), (0, 6)], 1, 0))
            with other, pytest.raises(cpattn_hf.ContextError, match="forward_context that was entered inside of its context_parallel"):
                called(**cp.inputs(input_ids))
        compiled(**cp.inputs(input_ids))
    with torch.inference_mode(), pytest.raises(cpattn_hf.ContextError, match="was called outside of a context"):
        compiled(**cp.inputs(input_ids))
    another = hf_cases.new_model("gpt_oss")
    another.set_attn_implementation("cpattn")
    with torch.inference_mode(), cpattn_hf.context_parallel(another, meta) as cp:
        with pytest.raises(cpattn_hf.ContextError, match="what a compiled graph calls is a layer of another model than the GptOss"):
            compiled(**cp.inputs(input_ids))
        another(**cp.inputs(input_ids))


def test_a_layers_attention_by_its_context() -> None:
    meta = cpattn.build_metadata([(0, 7)], 1, 0)
    q, k = torch.randn(1, 4, 7, 8), torch.randn(1, 2, 7, 8)
    with torch.inference_mode(), cpattn_hf.context_parallel(hf_cases.model_of("llama"), meta) as cp:
        with cpattn.forward_context(cpattn.build_metadata([(0, 3), (0, 4)], 1, 0)):
            out = cp.attend(q, k, k, window=3)
        rows_q, rows_k = q[0].transpose(0, 1), k[0].transpose(0, 1)
        assert torch.equal(out[0], cpattn.cp_attention(rows_q, rows_k, rows_k, meta, window=3))


def test_opcheck_of_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    cpattn_hf.register()
    meta = cpattn.build_metadata([(0, 5)], 1, 0)
    with cpattn_hf.context_parallel(hf_cases.model_of("llama"), meta) as cp:
        mask = cp.inputs(hf_cases.token_ids([(0, 5)]))["attention_mask"]
        # It hands copies of the mask to the operator, which takes only the context's own.
        monkeypatch.setattr(type(cp), "is_token_mask", lambda _, given: torch.equal(given, mask))
        results = opcheck(torch.ops.cpattn.token_mask.default, (mask, id(cp.decoder.model.config), torch.tensor(0)))
    assert set(results.values()) == {"SUCCESS"}


def test_check_finds_ranks_that_disagree() -> None:
    cpattn_hf.register()
    model = hf_cases.model_of("llama")
    model.set_attn_implementation("cpattn")

    def run(group: cpattn.Communicator) -> str:
        batch = [(0, 9), (0, 7)] if group.rank else [(0, 16)]
        meta = cpattn.build_metadata(batch, 2, group.rank)
        with torch.no_grad(), cpattn_hf.context_parallel(model, meta, group=group, check=True) as cp:
            arguments = cp.inputs(hf_cases.token_ids(batch))
            with pytest.raises(cpattn.DisagreementError) as raised:
                model(**arguments)
        return str(raised.value)

    assert all("the ranks disagree on the plan" in message for message in run_loopback(run, 2))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen3_window", {"sliding_window": 1000}),
        ("gemma2", {"sliding_window": 1000}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma3", {"sliding_window": 1000}),
        ("gpt_oss", {"sliding_window": 1000}),
        ("gpt_oss", {"sinks": None}),
    ],
    ids=str,
)
def test_a_dropped_feature_would_be_seen(family: str, changes: dict[str, object]) -> None:
    other = hf_cases.new_model(family, **{name: value for name, value in changes.items() if name != "sinks"})
    other.load_state_dict(hf_cases.model_of(family).state_dict())
    if "sinks" in changes:
        for layer in other.model.layers:
            torch.nn.init.constant_(layer.self_attn.sinks, -1e4)
    without = hf_cases.plain_logits(other, hf_cases.token_ids(BATCH), BATCH)
    assert relative_rmse(without, truth_of(family)) > 1000 * bound_of(family, torch.float32)
