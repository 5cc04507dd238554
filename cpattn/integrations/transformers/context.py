"""The context within which a model runs on one rank's rows: what it shards, attends over and gathers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cpattn.api import cp_attention, shard, unshard
from cpattn.call import checks
from cpattn.call.agreed import validated
from cpattn.call.forward_context import ForwardContext, entered
from cpattn.errors import CPError, PrefixError, RowCountError, TensorMismatchError, UnsupportedError
from cpattn.graphs import leaves_graph
from cpattn.integrations.transformers.context_error import ContextError
from cpattn.integrations.transformers.labels import BatchLabels, one_row
from cpattn.integrations.transformers.last_rows import last_rows
from cpattn.integrations.transformers.models import check_model
from cpattn.metadata.cp_metadata import CPMetadata
from cpattn.transports.gather import gather_whole
from cpattn.transports.groups import Group, as_transport
from cpattn.transports.in_flight import InFlight

_NOT_REACHED = (
    "no layer called cpattn's attention since the inputs were made: either the model did not run, or it has another attention, which "
    'saw this rank\'s rows alone. Load it with attn_implementation="cpattn", or call model.set_attn_implementation("cpattn")'
)


@leaves_graph
class ContextParallel:
    """Shards a model's inputs and labels, and gathers its logits and loss, for one batch. Made by :func:`context_parallel`."""

    def __init__(self, model: Any, meta: CPMetadata, group: Group, strategy: str, backend: str, check: bool) -> None:
        checks.check_metadata(meta)
        if meta.plan.num_prefix_tokens:
            raise PrefixError(
                f"the batch has {meta.plan.num_prefix_tokens} prefix tokens, but a model of transformers has no KV cache here that could "
                "hold them; give every request from its first token on: (0, prefix_len + extend_len)"
            )
        if not meta.plan.num_tokens:
            raise CPError("the batch has no new token; there is nothing to run a model on: skip it on every rank")
        self._transport = as_transport(group, meta.plan.cp_size)
        checks.check_group(meta, self._transport)
        self.decoder = check_model(model)
        self.meta = meta
        self._check = check
        # What each layer's call belongs to, also where the model is compiled.
        self.forward = ForwardContext(meta, self._transport, strategy, backend, check)
        # Which of the rows are tokens. That it is this tensor proves to the mask function that the inputs are ours.
        self._token_mask = (torch.arange(meta.rows, device=meta.device) < meta.num_tokens)[None]
        self.last_only = False
        self._inputs_made = False
        # Whether the model asked for cpattn's attention or mask, and how many layers had attended before the inputs were made.
        self.reached = False
        self._attended_before = 0
        # What a call of the model in another thread raised, which the caller may not have seen.
        self.missed: ContextError | None = None
        self.batch_labels = BatchLabels(meta, self._token_mask[0])

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

    def labels(self, labels: Tensor) -> Tensor:
        """The labels of this rank's rows: ``model(**cp.inputs(input_ids), shift_labels=cp.labels(input_ids))``.

        ``outputs.loss`` is then this rank's share of the mean over the batch: the sum over its labels, divided by the number of
        labels of the whole batch. A rank without labels has 0. :meth:`loss` sums the shares.

        Args:
            labels: integers ``[num_tokens]`` or ``[1, num_tokens]``, not shifted, the same on every rank: input_ids, with -100 in
                the place of tokens that are not to be predicted.

        Returns:
            int64 ``[1, meta.rows]``: for each row the label of the next token of its request; -100 for a request's last token, and
            on padding.

        Raises:
            TensorMismatchError, RowCountError.
        """
        return self.batch_labels.shift(one_row("labels", labels))

    def loss(self, outputs: Any) -> Tensor:
        """The mean loss over the labels of the whole batch, the same bits on every rank. A collective call.

        Args:
            outputs: what the model returned for :meth:`labels`, or its loss.

        Returns:
            A number (a tensor without an axis).

        Raises:
            ContextError: there is no loss. TensorMismatchError: it is no number.
        """
        share = outputs if isinstance(outputs, Tensor) else getattr(outputs, "loss", None)

        def validate() -> Tensor:
            self._check_attended()
            if share is None:
                raise ContextError(
                    f"{type(outputs).__name__} has no loss; call the model with labels: "
                    "model(**cp.inputs(input_ids), shift_labels=cp.labels(input_ids))"
                )
            if not isinstance(share, Tensor) or share.ndim or not share.is_floating_point():
                what = f"{share.dtype} {tuple(share.shape)}" if isinstance(share, Tensor) else f"a {type(share).__name__}"
                raise TensorMismatchError(f"the loss is {what}; pass the outputs of the model, or its loss: a floating number")
            checks.check_device("loss", share, self.meta)
            checks.check_no_grad(loss=share)
            return share

        with InFlight(self._transport, self.meta.device) as in_flight:
            share = validated(validate, lambda share: f"loss, {share.dtype}", self.meta.plan.fingerprint, in_flight, self._check, None)
            # In float64, so that the sum has the precision of its parts.
            return gather_whole(in_flight, "loss", share.double()[None]).sum().to(share.dtype)

    def gather(self, logits: Tensor) -> Tensor:
        """The logits of all tokens, in the original order, on every rank. A collective call.

        Args:
            logits: ``[1, meta.rows, vocab]``, as the model returned them (or any other values per row).

        Returns:
            ``[num_tokens, vocab]``.

        Raises:
            ContextError: inputs were made with last_only. RowCountError: another number of rows.
        """
        if self.last_only:
            raise ContextError(
                "the inputs were made with last_only=True, so that most logits do not exist; gather_last gathers those that do"
            )
        rows = self._rows(logits, self.meta.rows)
        return unshard(rows, self.meta, group=self._transport, check=self._check)

    def gather_last(self, logits: Tensor) -> Tensor:
        """The logits of each request's last token, on every rank. A collective call that sends no other rows.

        Args:
            logits: as the model returned them, from inputs with last_only or without.

        Returns:
            ``[num_requests, vocab]`` in the order of the batch; NaN for a request without tokens.

        Raises:
            RowCountError: another number of rows than the inputs had.
        """
        last = last_rows(self.meta)
        rows = self._rows(logits, len(last.keep) if self.last_only else self.meta.rows)
        if not self.last_only:
            rows = rows.index_select(0, last.keep)
        checks.check_no_grad(logits=rows)
        with InFlight(self._transport, rows.device) as in_flight:
            gathered = gather_whole(in_flight, "last logits", rows)
        out = rows.new_full((len(self.meta.plan.batch), *rows.shape[1:]), float("nan"))
        return out.index_copy_(0, last.request, gathered.index_select(0, last.place))

    def is_token_mask(self, mask: Any) -> bool:
        """Whether it is the attention_mask of :meth:`inputs`, or a view of all of it."""
        ours = self._token_mask
        return isinstance(mask, Tensor) and (mask.data_ptr(), mask.shape, mask.dtype) == (ours.data_ptr(), ours.shape, ours.dtype)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """cp_attention in the layout of transformers: ``[1, heads, rows, D]`` in, ``[1, rows, Hq, Dv]`` out."""
        self.check_rows(query, key)
        q, k, v = (as_under_autocast(x)[0].transpose(0, 1) for x in (query, key, value))
        with entered(self.forward):
            out: Tensor = cp_attention(q, k, v, None, **options)
        return out[None]

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

    def _rows(self, logits: Any, expected: int) -> Tensor:
        """``[expected, ...]`` from what the model returned."""
        self._check_attended()
        checks.check_tensor("logits", logits)
        if logits.ndim < 2 or logits.shape[:2] != (1, expected):
            raise RowCountError(
                f"logits has shape {tuple(logits.shape)}, but this rank's model returns [1, {expected}, ...] for these inputs; "
                "pass model(**cp.inputs(input_ids)).logits"
            )
        checks.check_device("logits", logits, self.meta)
        rows: Tensor = logits[0]
        return rows

    def _check_attended(self) -> None:
        attended = self.forward.calls - self._attended_before
        if not attended:
            raise self.missed or ContextError(_NOT_REACHED)
        if attended % self.decoder.num_layers:
            raise UnsupportedError(
                f"the model has {self.decoder.num_layers} layers, but called cpattn's attention {attended} times: some of its layers "
                "work by other means, which saw this rank's rows alone"
            )


def as_under_autocast(x: Tensor) -> Tensor:
    """In autocast's dtype, as torch's own attention takes it: models rotate q and k in fp32 even then."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(kind))
