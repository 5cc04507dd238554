"""A batch that a model runs on: this rank's rows of it, which its layers attend from, and what its calls are checked by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cpattn.api import shard
from cpattn.call import checks
from cpattn.call.forward_context import ForwardContext
from cpattn.errors import RowCountError, UnsupportedError
from cpattn.graphs import leaves_graph
from cpattn.integrations.transformers.context_error import ContextError
from cpattn.integrations.transformers.labels import one_row
from cpattn.integrations.transformers.last_rows import last_rows
from cpattn.integrations.transformers.models import Decoder

_NOT_REACHED = (
    "no layer called cpattn's attention since the inputs were made: either the model did not run, or it has another attention, which "
    'saw this rank\'s rows alone. Load it with attn_implementation="cpattn", or call model.set_attn_implementation("cpattn")'
)


@leaves_graph
class BatchContext:
    """What the calls of a model are about within a context: one batch, of which this rank has its rows.

    Attributes:
        decoder: the model.
        forward: what each layer's call belongs to, also where the model is compiled.
        meta: this rank's metadata of the batch.
        last_only: whether the inputs were made for the logits of last tokens alone.
        reached: whether the model asked for cpattn's attention or mask.
        missed: what a call of the model in another thread raised, which the caller may not have seen.
    """

    def __init__(self, decoder: Decoder, forward: ForwardContext) -> None:
        self.decoder = decoder
        self.forward = forward
        self.meta = meta = forward.meta
        decoder.check_lengths(int((meta.plan.prefix_lens + meta.plan.extend_lens).max()))
        # Which of the rows are tokens. That it is this tensor proves to the mask function that the inputs are ours.
        self._token_mask = (torch.arange(meta.rows, device=meta.device) < meta.num_tokens)[None]
        self.last_only = False
        self._inputs_made = False
        self.reached = False
        # How many layers had attended before the inputs were made.
        self._attended_before = 0
        self.missed: ContextError | None = None

    def inputs(self, input_ids: Tensor, *, last_only: bool = False) -> dict[str, Any]:
        """The arguments of the model for this rank: ``model(**cp.inputs(input_ids))``.

        Args:
            input_ids: integers ``[num_tokens]`` or ``[1, num_tokens]``: all requests one after another, without padding, the
                same on every rank.
            last_only: let the model compute logits for the last token of each request alone.

        Returns:
            input_ids, position_ids and attention_mask ``[1, meta.rows]``, use_cache, and with last_only logits_to_keep.
            Padding rows hold token 0 at position 0, and no one sees them.

        Raises:
            TensorMismatchError, RowCountError.
        """
        input_ids = one_row("input_ids", input_ids)
        arguments: dict[str, Any] = {
            "input_ids": shard(input_ids, self.meta)[None],
            "position_ids": self.meta.position_ids[None],
            "attention_mask": self._token_mask,
            "use_cache": False,
        }
        if last_only:
            arguments["logits_to_keep"] = last_rows(self.meta).keep
        self.last_only = last_only
        self._inputs_made = True
        self._attended_before = self.forward.calls
        return arguments

    def is_token_mask(self, mask: Any) -> bool:
        """Whether it is the attention_mask of :meth:`inputs`, or a view of all of it."""
        ours = self._token_mask
        return isinstance(mask, Tensor) and (mask.data_ptr(), mask.shape, mask.dtype) == (ours.data_ptr(), ours.shape, ours.dtype)

    def check_rows(self, query: Tensor, key: Tensor) -> None:
        """Raises CPError where a layer's queries ``[1, heads, rows, D]`` are not those of this batch, or its keys are others."""
        batch_size, _, num_queries, _ = query.shape
        if key.shape[2] != num_queries:
            raise UnsupportedError(
                f"a layer has {key.shape[2]} keys for {num_queries} queries, so it attends to a KV cache or to another sequence; "
                "cpattn runs a whole forward pass of a decoder without a cache: use_cache=False, no past_key_values"
            )
        if (batch_size, num_queries) != (1, self.meta.rows):
            raise RowCountError(
                f"a layer has {batch_size} x {num_queries} rows, but this rank's metadata has 1 x {self.meta.rows} (rank "
                f"{self.meta.cp_rank} of {self.meta.plan.cp_size}); call the model with cp.inputs(input_ids)"
            )

    def check_reached(self) -> None:
        """Raises ContextError if inputs were made, but no model has come to cpattn for its attention."""
        if self._inputs_made and not self.reached:
            raise self.missed or ContextError(_NOT_REACHED)

    def rows_of(self, logits: Any, expected: int) -> Tensor:
        """``[expected, ...]`` from what the model returned. Raises CPError for anything else than ``[1, expected, ...]``."""
        self.check_attended()
        checks.check_tensor("logits", logits)
        if logits.ndim < 2 or logits.shape[:2] != (1, expected):
            raise RowCountError(
                f"logits has shape {tuple(logits.shape)}, but this rank's model returns [1, {expected}, ...] for these inputs; "
                "pass model(**cp.inputs(input_ids)).logits"
            )
        checks.check_device("logits", logits, self.meta)
        rows: Tensor = logits[0]
        return rows

    def check_attended(self) -> None:
        """Raises CPError where not every layer has attended through cpattn since the inputs were made."""
        attended = self.forward.calls - self._attended_before
        if not attended:
            raise self.missed or ContextError(_NOT_REACHED)
        if attended % self.decoder.num_layers:
            raise UnsupportedError(
                f"the model has {self.decoder.num_layers} layers, but called cpattn's attention {attended} times: some of its layers "
                "work by other means, which saw this rank's rows alone"
            )
