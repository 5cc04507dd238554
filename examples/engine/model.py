"""A transformers model, whole on every rank, whose attention is cpattn's: the modules are the library's own.

transformers looks its attention function up by name, and passes keyword arguments of the model on to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

import cpattn
from engine.shape import ModelShape

_NAME = "cpattn_pool"
_HONOURED = {"position_ids", "use_cache"}  # already in q and k, and off

logging.set_verbosity_error()


def build_model(shape: ModelShape, seed: int) -> PreTrainedModel:
    """The same random weights wherever it is called with the same arguments."""
    options = {name: value for name, value in vars(shape).items() if name != "kind"}
    no_special_tokens = dict.fromkeys(["bos_token_id", "eos_token_id", "pad_token_id"])
    config = AutoConfig.for_model(shape.kind, **options, **no_special_tokens, tie_word_embeddings=False, max_position_embeddings=4096)
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    return model.eval()


@dataclass(frozen=True, eq=False)
class PoolStep:
    """What the attention of every layer needs of a step: made once, used by all."""

    pool: cpattn.KVPool
    meta: cpattn.CPMetadata
    page_table: Tensor
    backend: str | Callable[..., tuple[Tensor, Tensor]] = "auto"


def pool_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    pool_step: PoolStep | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query ``[1, Hq, rows, D]``, key and value ``[1, Hkv, rows, D]``, rotated already;
    returns ``[1, rows, Hq, D]`` and no weights."""
    unknown = [name for name, value in others.items() if value is not None and name not in _HONOURED]
    if pool_step is None or attention_mask is not None or dropout or is_causal is False or unknown:
        raise NotImplementedError(
            f"causal self-attention over a KVPool, in a model called with pool_step=, has no {unknown or 'mask or dropout'}"
        )
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    layer: Any = module.layer_idx
    out = cpattn.cp_attention(
        q,
        k,
        v,
        pool_step.meta,
        kv_cache=pool_step.pool.layer(layer, pool_step.page_table),
        scale=scaling,
        window=sliding_window,
        backend=pool_step.backend,
        # An exception on one rank is one on all, so that all take the step back. It waits for the device in every call.
        check=True,
        label=f"layer {layer}",
    )
    return out[None], None


# A name without a mask function would be given a mask of None as well, but by accident.
AttentionInterface.register(_NAME, pool_attention)
AttentionMaskInterface.register(_NAME, lambda *arguments, **options: None)


def use_pool(model: PreTrainedModel) -> None:
    """From here on the model attends through :func:`pool_attention`."""
    model.set_attn_implementation(_NAME)
