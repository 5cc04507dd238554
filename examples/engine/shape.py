"""The size of the model, apart from the model: who only starts processes need not import transformers, which takes seconds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    """About 8M parameters in float32, with 4 query heads to a KV head.

    The weights are larger than a trained model's first ones, so that an answer depends on all of the prompt.
    """

    kind: str = "qwen3"
    vocab_size: int = 8192
    hidden_size: int = 256
    intermediate_size: int = 1536
    num_hidden_layers: int = 3
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    head_dim: int = 32
    initializer_range: float = 0.08
