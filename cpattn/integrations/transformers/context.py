"""The context within which a model runs on one rank's rows: what it shards, attends over and gathers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cpattn.api import cp_attention, unshard
from cpattn.call import checks
from cpattn.call.agreed import validated
from cpattn.call.forward_context import ForwardContext, entered
from cpattn.errors import OptionError, TensorMismatchError
from cpattn.graphs import leaves_graph
from cpattn.integrations.transformers.autocast import as_under_autocast
from cpattn.integrations.transformers.batch_context import BatchContext
from cpattn.integrations.transformers.context_error import ContextError
from cpattn.integrations.transformers.generation import Over, run
from cpattn.integrations.transformers.labels import BatchLabels, one_row
from cpattn.integrations.transformers.last_rows import last_rows
from cpattn.integrations.transformers.models import Decoder
from cpattn.transports.gather import gather_whole
from cpattn.transports.in_flight import InFlight
from cpattn.transports.transport import Transport

# What the context says of a generation within it.
_OF_CONTEXT = ("attention_mask", "group", "strategy", "backend", "check")


@leaves_graph
class ContextParallel(BatchContext):
    """Shards a model's inputs and labels, and gathers its logits and loss, for one batch. Made by :func:`context_parallel`."""

    def __init__(self, decoder: Decoder, forward: ForwardContext, transport: Transport) -> None:
        super().__init__(decoder, forward)
        self._transport = transport
        self.batch_labels = BatchLabels(self.meta, self._token_mask[0])

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
            self.check_attended()
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
            share = validated(validate, lambda share: f"loss, {share.dtype}", self.meta.plan, in_flight, self.forward.check, None)
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
        rows = self.rows_of(logits, self.meta.rows)
        return unshard(rows, self.meta, group=self._transport, check=self.forward.check)

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
        rows = self.rows_of(logits, len(last.keep) if self.last_only else self.meta.rows)
        if not self.last_only:
            rows = rows.index_select(0, last.keep)
        checks.check_no_grad(logits=rows)
        with InFlight(self._transport, rows.device) as in_flight:
            gathered = gather_whole(in_flight, "last logits", rows)
        out = rows.new_full((len(self.meta.plan.batch), *rows.shape[1:]), float("nan"))
        return out.index_copy_(0, last.request, gathered.index_select(0, last.place))

    def generate(self, model: Any, input_ids: Tensor, *, cache: str = "sharded", seed: int | None = None, **options: Any) -> list[Tensor]:
        """Answers to the prompts of this batch: :func:`generate`, with the group, strategy, backend and check of this context.

        Args:
            model: that which the context was entered with.
            input_ids: integers ``[num_tokens]`` or ``[1, num_tokens]``, as for :meth:`inputs`.
            cache, seed, options: as :func:`generate` takes them.

        Returns:
            For each request of the batch int64 ``[length + new]``: its prompt and the answer.

        Raises:
            As :func:`generate`; RowCountError: input_ids has not the tokens of the batch. OptionError: what the context says is given
            again. ContextError: it is another model.
        """
        again = [name for name in _OF_CONTEXT if name in options]
        if again:
            raise OptionError(
                f"cp.generate got {', '.join(again)}; its prompts are those of the context, without padding, and so are group, strategy, "
                f"backend and check. Leave {', '.join(again)} out here; context_parallel takes what it can be told"
            )
        row = one_row("input_ids", input_ids)
        checks.check_whole("input_ids", row, 0, self.meta)
        prompts = list(torch.split(row[: self.meta.plan.num_tokens], self.meta.plan.extend_lens.tolist()))
        over = Over(self._transport, self.forward.strategy, self.forward.backend, self.forward.check, within=self)
        answers = run(model, prompts, None, over, {"cache": cache, "seed": seed, **options})
        assert isinstance(answers, list)
        return answers

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """cp_attention in the layout of transformers: ``[1, heads, rows, D]`` in, ``[1, rows, Hq, Dv]`` out."""
        self.check_rows(query, key)
        q, k, v = (as_under_autocast(x)[0].transpose(0, 1) for x in (query, key, value))
        with entered(self.forward):
            out: Tensor = cp_attention(q, k, v, None, **options)
        return out[None]
