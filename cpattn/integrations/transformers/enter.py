"""Entering a context: from then on a model's attention spans the ranks, and its calls with labels are completed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from cpattn.call import forward_context
from cpattn.graphs import leaves_graph
from cpattn.integrations.transformers.active import context_here, entered
from cpattn.integrations.transformers.context import ContextParallel
from cpattn.integrations.transformers.watch import watched
from cpattn.metadata.cp_metadata import CPMetadata
from cpattn.transports.groups import Group


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
    cp = ContextParallel(model, meta, group, strategy, backend, check)
    with entered(cp), forward_context.entered(cp.forward), watched(cp.decoder.model, _complete_call):
        yield cp
    cp.check_reached()


@leaves_graph
def _complete_call(model: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call with labels, as the context of this thread wants them."""
    cp = context_here()
    return arguments if cp is None or cp.decoder.model is not model else cp.batch_labels.complete(model, arguments, cp.last_only)
