"""Which models can run with their sequence sharded: those in which tokens meet in attention alone."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from cpattn.errors import CPError, UnsupportedError
from cpattn.integrations.transformers.context_error import ContextError
from cpattn.integrations.transformers.rotation import check_rotation

LAYER_TYPES = ("full_attention", "sliding_attention")


class Decoder:
    """A model that can run with its sequence sharded.

    Attributes:
        model: of transformers, without what wraps it.
        num_layers: as often must each pass call attention.
    """

    def __init__(self, model: PreTrainedModel, num_layers: int) -> None:
        self.model = model
        self.num_layers = num_layers
        self._modules: frozenset[int] = frozenset()
        self._configs: frozenset[int] = frozenset()

    @property
    def vocab_size(self) -> int:
        """How many token ids the model looks up, those included that were added after it was configured."""
        embedding = self.model.get_input_embeddings()
        known = getattr(embedding, "num_embeddings", None)
        return int(self.model.config.get_text_config(decoder=True).vocab_size if known is None else known)

    def check_lengths(self, longest: int) -> None:
        """Raises UnsupportedError where the longest sequence of a batch, in tokens, changes how the model rotates."""
        check_rotation(self.model.config.get_text_config(decoder=True), longest)

    def has_config(self, config: Any) -> bool:
        """Whether it is that of the model, or of a part of it."""
        return config is not None and any(getattr(module, "config", None) is config for module in self.model.modules())

    def check_config(self, number: int) -> None:
        """Raises ContextError where ``id`` of a config is that of another model, which nobody has checked."""
        if number in self._configs:
            return
        # Modules may have been replaced since the last look.
        self._configs = frozenset(id(getattr(module, "config", None)) for module in self.model.modules())
        if number not in self._configs:
            raise self._is_of_another("what a compiled graph calls")

    def check_layer(self, layer: nn.Module) -> None:
        """Raises ContextError if it is a layer of another model, which nobody has checked."""
        if id(layer) in self._modules or getattr(layer, "config", None) is None:
            return
        # Modules may have been replaced since the last look.
        self._modules = frozenset(map(id, self.model.modules()))
        if id(layer) not in self._modules:
            raise self._is_of_another(type(layer).__name__)

    def check_same(self, other: Decoder) -> None:
        """Raises ContextError where the other one is of another model."""
        if other.model is not self.model:
            raise ContextError(
                f"cp.generate got another {type(other.model).__name__} than the {type(self.model).__name__} that this context was entered "
                "for; pass that one, or enter context_parallel for the other"
            )

    def _is_of_another(self, layer: str) -> ContextError:
        return ContextError(
            f"{layer} is a layer of another model than the {type(self.model).__name__} that this context was entered "
            "for; run one model in a context: leave this one, and enter context_parallel for the other"
        )


def check_model(model: Any) -> Decoder:
    """Refuses a model whose layers mix tokens by other means than attention, which a shard of the sequence would cut.

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
        has_attention = any("attention" in type(m).__name__.lower() for m in pretrained.modules())
        what = "computes attention by code of its own, not throughout by" if has_attention else "has no attention, and so none through"
        raise UnsupportedError(
            f"{name} {what} the attention interface of transformers (is_backend_compatible() is False), which is what cpattn takes "
            "over; choose a model that attends through it"
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
    return Decoder(pretrained, int(config.num_hidden_layers))
