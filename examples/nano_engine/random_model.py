"""A Qwen3 with random weights, as a folder that nano-vllm loads: its configuration and a file of safetensors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file


class Shape(NamedTuple):
    """Of the model. That of Qwen3-0.6B by default, with a last layer of its own.

    Attributes:
        sharpness: by how much queries are longer than a norm makes them, so that a token looks at few others, whichever they are.
            Over an even mean of thousands the loss of a key would change nothing.
    """

    vocab: int = 151936
    width: int = 1024
    inner: int = 3072
    layers: int = 28
    heads: int = 16
    kv_heads: int = 8
    head_dim: int = 128
    dtype: str = "bfloat16"
    sharpness: float = 2.0


SMALL = Shape(vocab=512, width=64, inner=128, layers=3, heads=4, kv_heads=2, head_dim=32, dtype="float32", sharpness=4.0)


def write_model(folder: Path, shape: Shape, max_length: int, seed: int = 0) -> None:
    """Writes it for contexts of up to max_length tokens."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    random = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, shape.dtype)
    tensors: dict[str, torch.Tensor] = {}

    def linear(name: str, outputs: int, inputs: int, gain: float = 1.0) -> None:
        weight = torch.randn(outputs, inputs, generator=random, device=device).mul_(gain / math.sqrt(inputs))
        tensors[f"{name}.weight"] = weight.to(dtype).cpu()

    def norm(name: str, size: int, gain: float = 1.0) -> None:
        tensors[f"{name}.weight"] = torch.full((size,), gain, dtype=dtype)

    linear("model.embed_tokens", shape.vocab, shape.width, gain=math.sqrt(shape.width))
    for number in range(shape.layers):
        layer = f"model.layers.{number}"
        linear(f"{layer}.self_attn.q_proj", shape.heads * shape.head_dim, shape.width)
        linear(f"{layer}.self_attn.k_proj", shape.kv_heads * shape.head_dim, shape.width)
        linear(f"{layer}.self_attn.v_proj", shape.kv_heads * shape.head_dim, shape.width)
        linear(f"{layer}.self_attn.o_proj", shape.width, shape.heads * shape.head_dim)
        norm(f"{layer}.self_attn.q_norm", shape.head_dim, gain=shape.sharpness)
        norm(f"{layer}.self_attn.k_norm", shape.head_dim)
        linear(f"{layer}.mlp.gate_proj", shape.inner, shape.width)
        linear(f"{layer}.mlp.up_proj", shape.inner, shape.width)
        linear(f"{layer}.mlp.down_proj", shape.width, shape.inner)
        norm(f"{layer}.input_layernorm", shape.width)
        norm(f"{layer}.post_attention_layernorm", shape.width)
    norm("model.norm", shape.width)
    linear("lm_head", shape.vocab, shape.width, gain=8.0)
    save_file(tensors, str(folder / "model.safetensors"))
    config = {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": shape.vocab,
        "hidden_size": shape.width,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": max_length,
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "dtype": shape.dtype,
    }
    (folder / "config.json").write_text(json.dumps(config))
