"""Which models can run with their sequence sharded: those in which tokens meet in attention alone."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from cpattn.errors import CPError, UnsupportedError

LAYER_TYPES = ("full_attention", "sliding_attention")


def check_model(model: Any) -> int:
    """Refuses a model whose layers mix tokens by other means than attention, which a shard of the sequence would cut.

    Returns:
        The number of its decoder layers: as often must each pass call attention.

    Raises:
        CPError: not a transformers model.
        UnsupportedError: it does not use the attention interface, or has recurrent, convolutional or chunked layers.
    """
    found = [m for m in model.modules() if isinstance(m, PreTrainedModel)] if isinstance(model, nn.Module) else []
    if not found:
        raise CPError(f"model is a {type(model).__name__}; pass the transformers model (or a module that wraps it)")
    pretrained = found[0]
    name = type(pretrained).__name__
    if not pretrained.is_backend_compatible():
        raise UnsupportedError(
            f"{name} does not use the attention interface of transformers throughout (is_backend_compatible() is False), "
            "so that cpattn can not take its attention over; choose a model that does"
        )
    config = pretrained.config.get_text_config(decoder=True)
    other_layers = sorted({str(kind) for kind in getattr(config, "layer_types", None) or ()} - set(LAYER_TYPES))
    if other_layers:
        raise UnsupportedError(
            f"{name} has layers of type {', '.join(other_layers)}; only {' and '.join(LAYER_TYPES)} can run with the sequence "
            "sharded: others carry state along the sequence, or choose keys by other rules"
        )
    convolution = next((path for path, m in pretrained.get_decoder().named_modules() if isinstance(m, nn.Conv1d)), None)
    if convolution is not None:
        raise UnsupportedError(
            f"{name} has a convolution along the sequence ({convolution}), which would read the wrong neighbours where the sequence "
            "is sharded; only models whose tokens meet in attention alone can run"
        )
    return int(config.num_hidden_layers)
