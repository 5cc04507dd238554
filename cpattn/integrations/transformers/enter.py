"""Entering a context: from then on a model's attention spans the ranks, and its calls with labels are completed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from cpattn.call import checks, forward_context
from cpattn.call.forward_context import ForwardContext
from cpattn.errors import CPError, PrefixError
from cpattn.graphs import leaves_graph
from cpattn.integrations.transformers.active import context_here, entered
from cpattn.integrations.transformers.context import ContextParallel
from cpattn.integrations.transformers.models import check_model
from cpattn.integrations.transformers.watch import watched
from cpattn.metadata.cp_metadata import CPMetadata
from cpattn.transports.groups import Group, as_transport


@contextmanager
def context_parallel(
    model: Any,
    meta: CPMetadata,
    *,
    group: Group = None,
    strategy: str = "auto",
    backend: str = "auto",
    check: bool = False,
) -> Iterator[ContextParallel]:
    """Within it, the attention of a model with ``attn_implementation="cpattn"`` spans the ranks of ``group``.

    ::

        with torch.no_grad(), context_parallel(model, meta, group=group) as cp:
            logits = cp.gather(model(**cp.inputs(input_ids)).logits)
            loss = cp.loss(model(**cp.inputs(input_ids), shift_labels=cp.labels(input_ids)))

    It holds for this one model, in this thread (or task).

    Args:
        model: a causal decoder model of transformers, in evaluation mode, the same on every rank.
        meta: this rank's metadata of a batch without prefixes, on the model's device.
        group, strategy, backend, check: as in :func:`cpattn.cp_attention`, of every layer.

    Yields:
        What shards the model's inputs and labels, and gathers its logits and loss.

    Raises:
        ContextError: it is nested in another one, or the model did not attend through cpattn.
        PrefixError: a request has a prefix.
        CPError: in other subclasses: the model or the group does not fit.
    """
    checks.check_metadata(meta)
    if meta.plan.num_prefix_tokens:
        raise PrefixError(
            f"the batch has {meta.plan.num_prefix_tokens} prefix tokens, but a model of transformers has no KV cache here that could "
            "hold them; give every request from its first token on: (0, prefix_len + extend_len)"
        )
    if not meta.plan.num_tokens:
        raise CPError("the batch has no new token; there is nothing to run a model on: skip it on every rank")
    transport = as_transport(group, meta.plan.cp_size)
    checks.check_group(meta, transport)
    cp = ContextParallel(check_model(model), ForwardContext(meta, transport, strategy, backend, check), transport)
    with entered(cp), forward_context.entered(cp.forward), watched(cp.decoder.model, _complete_call):
        yield cp
    cp.check_reached()


@leaves_graph
def _complete_call(model: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call with labels, as the context of this thread wants them."""
    cp = context_here()
    if not isinstance(cp, ContextParallel) or cp.decoder.model is not model:
        return arguments
    return cp.batch_labels.complete(model, arguments, cp.last_only)
