"""What transformers calls: the attention function and the mask function, under the name ``"cpattn"``."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from cpattn.api import cp_attention
from cpattn.call.forward_context import current_context
from cpattn.call.in_graph import order
from cpattn.errors import UnsupportedError
from cpattn.graphs import has_operator, leaves_graph
from cpattn.integrations.transformers.active import active_context
from cpattn.integrations.transformers.autocast import as_under_autocast
from cpattn.integrations.transformers.batch_context import BatchContext
from cpattn.integrations.transformers.context_error import ContextError
from cpattn.integrations.transformers.masks import CausalMask, MaskFunction, describe_mask, is_causal
from cpattn.ops import implements

NAME = "cpattn"
"""What ``attn_implementation=`` takes, once :func:`register` was called."""

# Keyword arguments that reach the attention of some models and mean nothing to it: positions have been rotated into q and k,
# and the others are about outputs elsewhere. All others are refused unless they are None.
_MEANINGLESS = frozenset(
    {
        "cache_position",
        "deterministic",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "shift_labels",
    }
)
# These mean nothing only when they are off.
_MEANINGLESS_IF_FALSE = {
    "output_attentions": "attention weights never exist; leave output_attentions off",
    "use_cache": "a KV cache would hold this rank's rows alone; pass use_cache=False, as cp.inputs does",
}


def register() -> None:
    """Makes ``attn_implementation="cpattn"`` known to transformers. Can be called again; changes no model.

    Such a model runs within :func:`context_parallel` only.
    """
    AttentionInterface.register(NAME, attention_forward)
    # A name without a mask function would silently get no mask, whatever the model asks for.
    AttentionMaskInterface.register(NAME, mask_forward)


@has_operator
def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    *,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """One layer's attention over the whole context, as transformers calls it.

    Args:
        query: ``[1, Hq, rows, D]``, rotated; key and value ``[1, Hkv, rows, D]``, heads not repeated.
        attention_mask: what :func:`mask_forward` returned.
        scaling, sliding_window, softcap, s_aux: scale, window, softcap and sinks of :func:`cpattn.cp_attention`.

    Returns:
        ``[1, rows, Hq, Dv]``, and None for the weights.
    """
    if not torch.compiler.is_dynamo_compiling():
        _check_here(module, query, key)
    if not isinstance(attention_mask, CausalMask):
        what = f"of shape {tuple(attention_mask.shape)}" if isinstance(attention_mask, Tensor) else repr(attention_mask)
        raise UnsupportedError(
            f"{type(module).__name__} got an attention_mask ({what}) that cpattn's mask function did not make; call the model with "
            "cp.inputs(input_ids): masks of one's own, padding and bidirectional layers are not supported"
        )
    if dropout:
        raise UnsupportedError(f"dropout={dropout}, but cpattn is for inference; call model.eval()")
    if is_causal is False or (is_causal is None and getattr(module, "is_causal", True) is False):
        raise UnsupportedError(f"{type(module).__name__} has is_causal=False; cpattn computes causal attention only")
    if sliding_window is not None and sliding_window != attention_mask.window:
        raise UnsupportedError(
            f"{type(module).__name__} asks for sliding_window={sliding_window}, but its mask for {attention_mask.window}; "
            "which of the two is meant depends on the attention implementation"
        )
    _refuse_forgotten(module, softcap=softcap, s_aux=s_aux)
    _refuse_unknown(module, kwargs)
    q, k, v = (as_under_autocast(x)[0].transpose(0, 1) for x in (query, key, value))
    # Of the forward context, which context_parallel has entered: a compiled model is not made anew for each batch.
    return cp_attention(q, k, v, None, scale=scaling, window=attention_mask.window, softcap=softcap, sinks=s_aux)[None], None


def _check_here(module: nn.Module, query: Tensor, key: Tensor) -> None:
    """What a compiled model is spared: its mask has asked for the context and the model, and its operator looks at the rows."""
    context = active_context(getattr(module, "config", None))
    context.decoder.check_layer(module)
    context.check_rows(query, key)
    _check_forward(context)


def _check_forward(context: BatchContext) -> None:
    """Raises ContextError where a forward context has been entered within that of the model, and would give its layers another batch."""
    if current_context() is not context.forward:
        raise ContextError(
            "a model was called within a cpattn.forward_context that was entered inside of its context_parallel; leave it before the model "
            "is called, as context_parallel has the batch"
        )


@has_operator
def mask_forward(
    *,
    q_length: int,
    kv_length: int,
    mask_function: MaskFunction,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    config: Any = None,
    **_: Any,
) -> CausalMask:
    """What layers get as their attention_mask: the window of the mask that the model asks for.

    The model is given an attention_mask of ours, so that transformers does not look for packed sequences in our rows, whose
    positions jump: ``mask_function`` is then about one sequence, and ``allow_is_causal_skip`` is off only where the model
    overlays it.
    """
    overlaid = use_vmap or not allow_is_causal_skip
    if torch.compiler.is_dynamo_compiling() and isinstance(attention_mask, Tensor) and not (overlaid or isinstance(q_offset, Tensor)):
        window = None if local_size is None else operator.index(local_size)
        if (q_offset, kv_offset, kv_length) == (0, 0, q_length) and is_causal(mask_function, window):
            torch.ops.cpattn.token_mask.default(attention_mask, id(config), order())
            return CausalMask(window)
    return _mask_here(mask_function, attention_mask, local_size, overlaid, config, (q_offset, kv_offset, q_length, kv_length))


@leaves_graph
def _mask_here(
    mask_function: MaskFunction, attention_mask: Tensor | None, local_size: int | None, overlaid: bool, config: Any, places: tuple[Any, ...]
) -> CausalMask:
    _check_token_mask(attention_mask, active_context(config))
    q_offset, kv_offset, q_length, kv_length = places
    if isinstance(q_offset, Tensor) or (q_offset, kv_offset, kv_length) != (0, 0, q_length):
        raise UnsupportedError(
            f"the model was called with past_key_values ({kv_length} keys for {q_length} new tokens); "
            "a cache of transformers cannot hold a sharded sequence: pass none, and use_cache=False; cp.generate has a cache of its own"
        )
    return describe_mask(mask_function, local_size, overlaid)


@implements("token_mask")
def _token_mask_operator(attention_mask: Tensor, config: int, order: Tensor | None) -> None:
    # Of the config a graph has the number alone, which is not looked for in the contexts of other threads.
    context = active_context(config=None)
    context.decoder.check_config(config)
    _check_token_mask(attention_mask, context)
    _check_forward(context)


def _check_token_mask(attention_mask: Tensor | None, context: BatchContext) -> None:
    if not context.is_token_mask(attention_mask):
        what = "no attention_mask" if attention_mask is None else f"an attention_mask of shape {tuple(attention_mask.shape)}"
        raise ContextError(
            f"the model was called with {what}, not with that of cp.inputs(input_ids); call model(**cp.inputs(input_ids)). Instead of "
            "padding give the requests in one packed row: the batch of the plan has their lengths. The model's own generate() is not "
            "supported; cp.generate(model, input_ids, max_new_tokens=...) is"
        )


# Where layers keep what they should pass.
_KEPT_AS = {"softcap": "attn_logit_softcapping", "s_aux": "sinks"}


def _refuse_forgotten(module: nn.Module, **passed: Any) -> None:
    for name, value in passed.items():
        if value is None and getattr(module, _KEPT_AS[name], None) is not None:
            raise UnsupportedError(
                f"{type(module).__name__} has {_KEPT_AS[name]}, but does not pass it to its attention as {name}; transformers itself may "
                "ignore it: set it to None if that is meant"
            )


def _refuse_unknown(module: nn.Module, kwargs: dict[str, Any]) -> None:
    for name, value in kwargs.items():
        if value is None or name in _MEANINGLESS:
            continue
        if name not in _MEANINGLESS_IF_FALSE:
            what = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise UnsupportedError(
                f"{type(module).__name__} passes {name} ({what}) to its attention, which cpattn does not know how to honour"
            )
        if value:
            raise UnsupportedError(f"{name}={value!r}: {_MEANINGLESS_IF_FALSE[name]}")
