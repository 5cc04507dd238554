"""What the adapter cannot honour it refuses, in words that say what to do."""

from __future__ import annotations

import contextvars
import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import transformers
from programs import hf_cases
from torch import Tensor

import cpattn
from cpattn.integrations import transformers as cpattn_hf
from cpattn.integrations.transformers.attention import attention_forward
from cpattn.integrations.transformers.masks import CausalMask
from cpattn.testing import SoloCommunicator

BATCH = [(0, 11), (0, 0), (0, 5)]
IDS = hf_cases.token_ids(BATCH)
TINY: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


@pytest.fixture
def model() -> Any:
    cpattn_hf.register()
    llama = hf_cases.new_model("llama")
    llama.set_attn_implementation("cpattn")
    return llama


def context(model: Any, batch: list[tuple[int, int]] = BATCH, **options: Any) -> AbstractContextManager[cpattn_hf.ContextParallel]:
    return cpattn_hf.context_parallel(model, cpattn.build_metadata(batch, 1, 0), **options)


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


# What must surround a model.


def test_outside_of_a_context(model: Any) -> None:
    with pytest.raises(cpattn_hf.ContextError, match=r"called outside of a context.*with context_parallel\(model, meta\) as cp"):
        model(IDS[None])


def test_nested_contexts(model: Any) -> None:
    with context(model), pytest.raises(cpattn_hf.ContextError, match="leave the first"), context(model):
        pass
    with context(model) as cp:  # The outer one is gone as well.
        model(**cp.inputs(IDS))


def test_a_failure_within_ends_the_context(model: Any) -> None:
    with pytest.raises(KeyError), context(model) as cp:
        cp.inputs(IDS).pop("no such input")
    with context(model):
        pass


def test_prefixes(model: Any) -> None:
    with (
        pytest.raises(cpattn.PrefixError, match=r"the batch has 9 prefix tokens.*give every request from its first token"),
        context(model, [(9, 3)]),
    ):
        pass


def test_empty_batch(model: Any) -> None:
    with pytest.raises(cpattn.CPError, match=r"no new token.*skip it on every rank"), context(model, [(0, 0)]):
        pass


def test_metadata_and_group(model: Any) -> None:
    with pytest.raises(cpattn.CPError, match="meta is a list"), cpattn_hf.context_parallel(model, BATCH):  # type: ignore[arg-type]
        pass
    with (
        pytest.raises(cpattn.GroupError, match="the group has 3 ranks, but the plan has cp_size=1"),
        context(model, group=SoloCommunicator(0, 3)),
    ):
        pass


def test_a_model_with_another_attention(model: Any) -> None:
    model.set_attn_implementation("sdpa")
    with context(model) as cp:
        local = model(**cp.inputs(IDS)).logits
        with pytest.raises(cpattn_hf.ContextError, match=r"no layer called cpattn's attention.*set_attn_implementation\(\"cpattn\"\)"):
            cp.gather(local)
        model.set_attn_implementation("cpattn")
        cp.gather(model(**cp.inputs(IDS)).logits)
    model.set_attn_implementation("sdpa")
    with pytest.raises(cpattn_hf.ContextError, match="no layer called"), context(model) as cp:  # Not gathered either.
        model(**cp.inputs(IDS))


def test_two_models_in_one_context(model: Any) -> None:
    other = hf_cases.new_model("llama", num_hidden_layers=3)
    other.set_attn_implementation("cpattn")
    with context(model) as cp:
        inputs = cp.inputs(IDS)
        with pytest.raises(
            cpattn_hf.ContextError,
            match="LlamaAttention is a layer of another model than the LlamaForCausalLM that this context was entered for; run one model",
        ):
            other(**inputs)
        cp.gather(model(**inputs).logits)
    with context(other) as cp:
        cp.gather(other(**cp.inputs(IDS)).logits)


def test_a_copy_is_another_model(model: Any) -> None:
    with context(model) as cp:
        copied = copy.deepcopy(model)
        with pytest.raises(cpattn_hf.ContextError, match="layer of another model"):
            copied(**cp.inputs(IDS))
        copied.set_attn_implementation("sdpa")
        assert copied(IDS[None], labels=IDS[None]).loss > 0
        model(**cp.inputs(IDS))


def test_layers_that_are_replaced_are_the_models(model: Any) -> None:
    with context(model) as cp:
        model(**cp.inputs(IDS))
        model.model.layers[0] = copy.deepcopy(model.model.layers[1])
        cp.gather(model(**cp.inputs(IDS)).logits)


def test_a_call_from_another_thread(model: Any) -> None:
    def call(arguments: dict[str, Any]) -> Any:
        with torch.no_grad():
            return model(**arguments)

    message = "the model was called in thread 'other_0', but its context_parallel was entered in thread 'MainThread', and holds in that"
    with ThreadPoolExecutor(1, "other") as pool:
        with context(model) as cp:
            with pytest.raises(cpattn_hf.ContextError, match=message):
                pool.submit(call, cp.inputs(IDS)).result()
            cp.gather(model(**cp.inputs(IDS)).logits)
        # Where nobody looks at what the thread raised.
        with pytest.raises(cpattn_hf.ContextError, match=message), context(model) as cp:
            pool.submit(call, cp.inputs(IDS)).exception()
        with pytest.raises(cpattn_hf.ContextError, match="called outside of a context"):
            pool.submit(call, {"input_ids": IDS[None]}).result()
        with context(model) as cp:  # A thread that takes the context along may call it.
            local = pool.submit(contextvars.copy_context().run, call, cp.inputs(IDS)).result().logits
            cp.gather(local)


# What cannot be sharded.


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transformers.Llama4TextConfig(**TINY, num_local_experts=1), "layers of type chunked_attention; only full_attention and sliding"),
        (transformers.Lfm2Config(**TINY, layer_types=["conv", "full_attention"]), "layers of type conv"),
        (
            transformers.MambaConfig(**{**TINY, "state_size": 4}),
            r"MambaForCausalLM has no attention, .* attention interface .*is_backend_compatible\(\) is False.*choose a model that attends",
        ),
        (
            transformers.GPTJConfig(vocab_size=99, n_embd=32, n_layer=1, n_head=2, rotary_dim=4),
            r"GPTJForCausalLM computes attention by code of its own, .*is_backend_compatible\(\) is False",
        ),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_models_that_mix_tokens_by_other_means(config: Any, message: str) -> None:
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(cpattn.UnsupportedError, match=message), context(model):
        pass


def test_a_convolution_in_the_decoder(model: Any) -> None:
    model.model.layers[1].mixer = torch.nn.Conv1d(4, 4, 3)
    with pytest.raises(cpattn.UnsupportedError, match=r"convolution along the sequence \(layers.1.mixer\)"), context(model):
        pass


def test_a_layer_without_attention(model: Any) -> None:
    class Recurrent(torch.nn.Module):
        def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
            return hidden_states.cumsum(1), None

    model.model.layers[1].self_attn = Recurrent()
    with context(model) as cp:
        local = model(**cp.inputs(IDS)).logits
        with pytest.raises(cpattn.UnsupportedError, match="the model has 2 layers, but called cpattn's attention 1 times"):
            cp.gather(local)


def test_what_is_no_model() -> None:
    with pytest.raises(cpattn.CPError, match="model is a Linear; pass the transformers model"), context(torch.nn.Linear(2, 2)):
        pass


def test_a_wrapped_model(model: Any) -> None:
    class Wrapper(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

    with context(Wrapper()) as cp:
        cp.gather(model(**cp.inputs(IDS)).logits)


# How a model is called.


def with_inputs(**changes: Any) -> Callable[[Any, cpattn_hf.ContextParallel], Any]:
    return lambda model, cp: model(**{**cp.inputs(IDS), **changes})


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (with_inputs(attention_mask=torch.ones(1, 16)), cpattn_hf.ContextError, r"attention_mask of shape \(1, 16\), not with that of"),
        (
            with_inputs(attention_mask=None),
            cpattn_hf.ContextError,
            r"no attention_mask.*Instead of padding give the requests in one packed",
        ),
        (
            with_inputs(attention_mask=torch.ones(1, 1, 16, 16)),
            cpattn.UnsupportedError,
            r"shape \(1, 1, 16, 16\)\) that cpattn's mask function",
        ),
        (with_inputs(use_cache=True), cpattn.UnsupportedError, "use_cache=True: a KV cache would hold this rank's rows alone"),
        (with_inputs(past_key_values=transformers.DynamicCache(), use_cache=True), cpattn.UnsupportedError, "use_cache=True"),
        (with_inputs(output_attentions=True), cpattn.UnsupportedError, "attention weights never exist"),
        (
            with_inputs(cu_seq_lens_q=torch.tensor([0, 16])),
            cpattn.UnsupportedError,
            r"passes cu_seq_lens_q \(a tensor \(2,\)\).*not know how",
        ),
        (with_inputs(is_causal=False), cpattn.UnsupportedError, "mask that is not causal"),
        (lambda model, cp: model(IDS[None]), cpattn_hf.ContextError, "no attention_mask"),
        (lambda model, cp: model.generate(IDS[None], max_new_tokens=2), cpattn_hf.ContextError, r"generate\(\) is not supported"),
    ],
)
def test_calls_that_are_not_of_our_inputs(model: Any, call: Any, kind: type[Exception], message: str) -> None:
    model.generation_config.pad_token_id = 0
    with context(model) as cp:
        with pytest.raises(kind, match=message):
            call(model, cp)
        model(**cp.inputs(IDS))


def test_a_filled_cache(model: Any) -> None:
    cache = transformers.DynamicCache()
    for layer in range(2):
        cache.update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16), layer)
    with context(model) as cp:
        with pytest.raises(cpattn.UnsupportedError, match=r"called with past_key_values \(.* for 16 new tokens\)"):
            model(**cp.inputs(IDS), past_key_values=cache)
        model(**cp.inputs(IDS))


def test_gradients(model: Any) -> None:
    with context(model) as cp:
        with torch.enable_grad(), pytest.raises(cpattn.UnsupportedError, match=r"forward pass only; call it under torch.no_grad"):
            model(**cp.inputs(IDS))
        model(**cp.inputs(IDS))


def test_dropout(model: Any) -> None:
    model.train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with context(model) as cp:
        with pytest.raises(cpattn.UnsupportedError, match=r"dropout=0.1.*call model.eval\(\)"):
            model(**cp.inputs(IDS))
        model.eval()
        model(**cp.inputs(IDS))


@pytest.mark.parametrize("feature", ["bidirectional", "overlay"])
def test_masks_that_are_not_causal(feature: str) -> None:
    cpattn_hf.register()
    model = hf_cases.new_model("gemma3", use_bidirectional_attention=feature == "overlay")
    model.set_attn_implementation("cpattn")
    if feature == "bidirectional":
        model.config.is_causal = False
    with pytest.raises(cpattn.UnsupportedError, match="that is not causal"), context(model) as cp:
        model(**cp.inputs(IDS))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sliding_window": 4}, "asks for sliding_window=4, but its mask for 7"),
        ({"attention_mask": None}, r"attention_mask \(None\) that cpattn's mask function did not make"),
        ({"position_bias": torch.zeros(1, 2, 3, 3)}, r"Identity passes position_bias \(a tensor \(1, 2, 3, 3\)\)"),
        ({"sinks_of_a_new_kind": 3.0}, r"passes sinks_of_a_new_kind \(3.0\)"),
        ({"is_causal": False}, "is_causal=False; cpattn computes causal attention only"),
        ({"s_aux": torch.zeros(3)}, "sinks has shape"),
        ({"softcap": -1.0}, "softcap=-1.0"),
        ({"scaling": 0.0}, "scale=0.0"),
    ],
    ids=str,
)
def test_what_a_layer_may_ask_for(model: Any, options: dict[str, Any], message: str) -> None:
    query, key = torch.zeros(1, 4, 16, 8), torch.zeros(1, 2, 16, 8)
    arguments: dict[str, Any] = {
        "attention_mask": CausalMask(7),
        "sliding_window": 7,
        "cache_position": torch.arange(3),
        "unheard_of": None,
    }
    with context(model):
        out, weights = attention_forward(torch.nn.Identity(), query, key, key, **arguments)
        assert out.shape == (1, 16, 4, 8)
        assert weights is None
        with pytest.raises(cpattn.CPError, match=message):
            attention_forward(torch.nn.Identity(), query, key, key, **{**arguments, **options})
        attention_forward(torch.nn.Identity(), query, key, key, **arguments)


@pytest.mark.parametrize(("name", "argument"), [("sinks", "s_aux"), ("attn_logit_softcapping", "softcap")])
def test_what_a_layer_has_but_does_not_pass(model: Any, name: str, argument: str) -> None:
    layer, query = torch.nn.Identity(), torch.zeros(1, 2, 16, 8)
    setattr(layer, name, torch.ones(2))
    with (
        context(model),
        pytest.raises(cpattn.UnsupportedError, match=f"Identity has {name}, but does not pass it to its attention as {argument}"),
    ):
        attention_forward(layer, query, query, query, CausalMask(None))


def test_rows_of_another_batch(model: Any) -> None:
    query = torch.zeros(1, 2, 9, 8)
    with context(model):
        with pytest.raises(cpattn.RowCountError, match=r"a layer has 1 x 9 rows, but this rank's metadata has 1 x 16 \(rank 0 of 1\)"):
            attention_forward(torch.nn.Identity(), query, query, query, CausalMask(None))
        with pytest.raises(cpattn.UnsupportedError, match="a layer has 12 keys for 9 queries"):
            attention_forward(torch.nn.Identity(), query, torch.zeros(1, 2, 12, 8), torch.zeros(1, 2, 12, 8), CausalMask(None))


# What is sharded and gathered.


@pytest.mark.parametrize(
    ("input_ids", "message"),
    [
        (IDS.view(2, 8), r"input_ids has shape \(2, 8\).*one after another, without padding"),
        (IDS[:-1], r"x has shape \(15,\), but the batch has 16 new tokens"),
        (IDS.float(), "input_ids is torch.float32"),
        (IDS.tolist(), "input_ids is a list"),
    ],
    ids=["padded", "short", "float", "list"],
)
def test_input_ids(model: Any, input_ids: Any, message: str) -> None:
    with context(model) as cp, pytest.raises(cpattn.CPError, match=message):
        cp.inputs(input_ids)


def test_gathering(model: Any) -> None:
    with context(model) as cp:
        few = model(**cp.inputs(IDS, last_only=True)).logits
        assert few.shape == (1, 2, 128)
        with pytest.raises(cpattn_hf.ContextError, match="last_only=True, so that most logits do not exist"):
            cp.gather(few)
        with pytest.raises(cpattn.RowCountError, match=r"this rank's model returns \[1, 2, ...\]"):
            cp.gather_last(few[0])
        local = model(**cp.inputs(IDS[None])).logits
        with pytest.raises(cpattn.RowCountError, match=r"logits has shape \(1, 15, 128\), but this rank's model returns \[1, 16, ...\]"):
            cp.gather(local[:, 1:])
        with pytest.raises(cpattn.TensorMismatchError, match="logits is a CausalLMOutputWithPast"):
            cp.gather(model(**cp.inputs(IDS)))


def test_registered_under_a_name_that_transformers_takes_as_it_is() -> None:
    cpattn_hf.register()
    assert "cpattn" in transformers.AttentionInterface().valid_keys()
    assert "cpattn" in transformers.AttentionMaskInterface().valid_keys()
