"""Small random-weight models of transformers, and what the ranks of tests/integrations run with them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor

import cpattn
from cpattn.integrations import transformers as cpattn_hf

_SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    # Large enough that scores differ, and that a window, a cap and a sink change the result.
    "initializer_range": 0.25,
}
_LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 7}

CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, {}),
    "qwen3": (transformers.Qwen3Config, {}),
    "qwen3_window": (transformers.Qwen3Config, {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "gemma2": (transformers.Gemma2Config, {**_LAYERS, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 9.0}),
    "gemma3": (transformers.Gemma3TextConfig, _LAYERS),
    # All experts for every token: otherwise rounding would say which.
    "gpt_oss": (transformers.GptOssConfig, {**_LAYERS, "num_local_experts": 4, "num_experts_per_tok": 4}),
}


def new_model(family: str, **changes: Any) -> Any:
    """A small model in float32 with random weights, the same in every process; all but its sizes as the family has it."""
    kind, features = CONFIGS[family]
    config = kind(**{**_SIZES, **features, **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter, std=2.0)
    return model.eval()


@cache
def model_of(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """The family's model. Its attention is set by whoever runs it."""
    model = new_model(family)
    if dtype == torch.float64:
        model.set_experts_implementation("eager")  # The grouped one has no float64.
    return model.to(dtype)


def token_ids(batch: Sequence[tuple[int, int]], seed: int = 1) -> Tensor:
    return torch.randint(128, (sum(extend for _, extend in batch),), generator=torch.Generator().manual_seed(seed))


def plain_logits(model: Any, input_ids: Tensor, batch: Sequence[tuple[int, int]]) -> Tensor:
    """``[num_tokens, vocab]`` of the model as transformers runs it, one request at a time."""
    model.set_attn_implementation("eager")
    requests = [ids for ids in torch.split(input_ids, [extend for _, extend in batch]) if len(ids)]
    with torch.no_grad():
        return torch.cat([model(ids[None], use_cache=False).logits[0] for ids in requests])


def sharded_logits(
    family: str, dtype: torch.dtype, plan: cpattn.Plan, strategy: str, group: Any, cp_rank: int
) -> tuple[Tensor, Tensor, Tensor]:
    """All logits, and those of the last tokens by both ways, of this rank in a group that runs the model together."""
    model = model_of(family, dtype)
    model.set_attn_implementation("cpattn")
    input_ids = token_ids(plan.batch)
    meta = plan.metadata(cp_rank)
    with torch.no_grad(), cpattn_hf.context_parallel(model, meta, group=group, strategy=strategy) as cp:
        local = model(**cp.inputs(input_ids)).logits
        everything, last = cp.gather(local), cp.gather_last(local)
        few = model(**cp.inputs(input_ids, last_only=True)).logits
        return everything, last, cp.gather_last(few)


def labels_of(input_ids: Tensor) -> Tensor:
    """The token ids, but for some that are not to be predicted."""
    return torch.where(input_ids % 5 == 0, -100, input_ids)


def plain_loss(model: Any, labels: Tensor, input_ids: Tensor, batch: Sequence[tuple[int, int]]) -> Tensor:
    """The mean over the labels of the batch, as transformers computes it for one request at a time. NaN without labels."""
    model.set_attn_implementation("eager")
    lengths = [extend for _, extend in batch]
    total, count = torch.zeros(()), 0
    with torch.no_grad():
        for ids, of_ids in zip(torch.split(input_ids, lengths), torch.split(labels, lengths), strict=True):
            wanted = int((of_ids[1:] != -100).sum())
            if wanted:
                total = total + model(ids[None], labels=of_ids[None], use_cache=False).loss.float() * wanted
                count += wanted
    return total / count


def sharded_loss(model: Any, labels: Tensor, plan: cpattn.Plan, group: Any, cp_rank: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """This rank's share of the loss, and the loss of the batch."""
    input_ids = token_ids(plan.batch).to(device)
    with torch.no_grad(), cpattn_hf.context_parallel(model, plan.metadata(cp_rank, device), group=group) as cp:
        outputs = model(**cp.inputs(input_ids), shift_labels=cp.labels(labels.to(device)))
        return outputs.loss.cpu(), cp.loss(outputs).cpu()


def run_on_gpu(family: str, mode: str, plan: cpattn.Plan) -> dict[str, Tensor]:
    """Logits and loss of a rank of the default group on its own GPU, sharded and plain.

    Args:
        mode: ``"float32"``, ``"bfloat16"`` weights, or float32 under ``"autocast"``.
    """
    cpattn_hf.register()
    device = f"cuda:{torch.cuda.current_device()}"
    model = new_model(family).to(device, torch.bfloat16 if mode == "bfloat16" else torch.float32)
    model.set_experts_implementation("eager")  # The grouped one wants larger sizes.
    input_ids, rank = token_ids(plan.batch), dist.get_rank()
    labels = labels_of(input_ids)
    with torch.autocast("cuda", torch.bfloat16, enabled=mode == "autocast"):
        plain = plain_logits(model, input_ids.to(device), plan.batch)
        loss = plain_loss(model, labels.to(device), input_ids.to(device), plan.batch)
        model.set_attn_implementation("cpattn")
        with torch.no_grad(), cpattn_hf.context_parallel(model, plan.metadata(rank, device), check=True) as cp:
            inputs = cp.inputs(input_ids.to(device))
            outputs = model(**inputs, shift_labels=cp.labels(labels.to(device)))
            sharded = {"logits": cp.gather(outputs.logits), "last": cp.gather_last(outputs.logits), "loss": cp.loss(outputs)}
            sharded["share"] = outputs.loss
        assert {str(x.device) for x in sharded.values()} == {device}
    return {name: x.float().cpu() for name, x in {**sharded, "plain logits": plain, "plain loss": loss}.items()}


def generate_on_gpu(family: str, dtype: torch.dtype, prompts: list[Tensor], new: int) -> dict[str, list[list[int]]]:
    """Answers of a rank of the default group on its own GPU: greedy ones over both kinds of cache, sampled ones, the model's own, and
    for Llama greedy ones of the compiled model."""
    cpattn_hf.register()
    device = f"cuda:{torch.cuda.current_device()}"
    model = new_model(family, tie_word_embeddings=False).to(device, dtype)
    model.set_experts_implementation("eager")  # The grouped one wants larger sizes.
    given = [prompt.to(device) for prompt in prompts]
    options: dict[str, Any] = {"max_new_tokens": new, "eos_token_id": None}
    own = [model.generate(ids[None], attention_mask=torch.ones_like(ids)[None], do_sample=False, **options)[0] for ids in given]
    model.set_attn_implementation("cpattn")
    answers: dict[str, Any] = {cache: cpattn_hf.generate(model, given, cache=cache, **options) for cache in ("sharded", "replicated")}
    answers["sampled"] = cpattn_hf.generate(model, given, do_sample=True, **options)
    if family == "llama":  # One is enough: to compile takes most of the time.
        answers["compiled"] = cpattn_hf.generate(torch.compile(model), given, **options)
    return {name: [ids.tolist() for ids in each] for name, each in {**answers, "own": own}.items()}
