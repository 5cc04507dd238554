"""Labels of a sharded sequence: the next token of the same request, which may lie on another rank.

A model shifts ``labels`` within the rows that it sees, where the next row need not be the next token. So labels are
shifted before they are sharded, and reach the loss as ``shift_labels``, with the number of labels of the whole batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from cpattn.api import shard
from cpattn.call import checks
from cpattn.device_tables import DeviceTables
from cpattn.errors import RowCountError, TensorMismatchError, UnsupportedError
from cpattn.metadata.cp_metadata import CPMetadata

IGNORED = -100
"""What the losses of transformers and torch pass over."""


def one_row(name: str, ids: Any) -> Tensor:
    """``[num_tokens]`` from integers ``[num_tokens]`` or ``[1, num_tokens]``. Raises TensorMismatchError, RowCountError."""
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        what = f"{ids.dtype}" if isinstance(ids, Tensor) else f"a {type(ids).__name__}"
        raise TensorMismatchError(f"{name} is {what}; pass an int64 or int32 tensor")
    row = ids[0] if ids.ndim == 2 and len(ids) == 1 else ids
    if row.ndim != 1:
        raise RowCountError(
            f"{name} has shape {tuple(ids.shape)}; pass [num_tokens] or [1, num_tokens]: the tokens of all requests one "
            "after another, without padding, whose lengths the batch of the plan gives"
        )
    return row


class _Shifted(NamedTuple):
    """Labels of one rank's rows, how many the whole batch has, on the device, and the version of the tensor that was counted."""

    labels: Tensor
    total: Tensor
    version: int


class BatchLabels:
    """Shifts labels for one rank of a batch, and knows how many the whole batch has."""

    def __init__(self, meta: CPMetadata, token_mask: Tensor) -> None:
        self._meta = meta
        self._token_mask = token_mask
        self._made: dict[int, _Shifted] = {}

    def shift(self, labels: Tensor) -> Tensor:
        """int64 ``[1, rows]`` from integers ``[num_tokens]``, as they are before a model shifts them."""
        meta, num_tokens, extend_lens = self._meta, self._meta.plan.num_tokens, self._meta.plan.extend_lens
        checks.check_whole("labels", labels, 0, meta)
        checks.check_device("labels", labels, meta)
        shifted = torch.full((num_tokens,), IGNORED, dtype=torch.int64, device=labels.device)
        shifted[:-1] = labels[1:num_tokens]
        ends = np.cumsum(extend_lens)[extend_lens > 0] - 1
        shifted.index_fill_(0, DeviceTables({"ends": ends}, labels.device)["ends"].long(), IGNORED)
        # A sum over no labels is 0, and must stay it.
        total = (shifted != IGNORED).sum().clamp(min=1)
        local = shard(shifted, meta).masked_fill_(~self._token_mask, IGNORED)[None]
        self._made[local.data_ptr()] = _Shifted(local, total, _version(local))
        return local

    def complete(self, model: nn.Module, arguments: dict[str, Any], last_only: bool) -> dict[str, Any]:
        """The arguments of a call of the model with labels, with what makes its loss this rank's share of the batch's mean."""
        name, labels, rows = type(model).__name__, arguments.get("shift_labels"), self._meta.rows
        if labels is None:
            raise UnsupportedError(
                f"{name} was called with labels, which it would shift within this rank's rows, where the next row need not be the next "
                "token; pass shift_labels=cp.labels(labels) instead, with labels of all tokens"
            )
        if last_only:
            raise UnsupportedError("the inputs were made with last_only=True, so that most logits do not exist; a loss needs all of them")
        if not isinstance(labels, Tensor) or labels.numel() != rows:
            what = f"of shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else f"a {type(labels).__name__}"
            raise RowCountError(f"shift_labels is {what}, but this rank has [1, {rows}] rows; pass cp.labels(labels)")
        if _adds_router_loss(model, arguments.get("output_router_logits")):
            raise UnsupportedError(
                f"{name} would add to its loss how evenly this rank's rows use its experts, which does not sum to that of the batch; "
                "set output_router_logits=False"
            )
        total = arguments.get("num_items_in_batch")
        if total is None:
            total = self._total_of(labels)
        return {**arguments, "labels": LabelsElsewhere(), "num_items_in_batch": total}

    def _total_of(self, labels: Tensor) -> Tensor:
        made = self._made.get(labels.data_ptr())
        if made is None or made.version != _version(labels):
            why = "were not made by cp.labels of this context" if made is None else "have been written to since cp.labels made them"
            raise UnsupportedError(
                f"shift_labels {why}. The loss is divided by the number of labels of the whole batch, which is then unknown; "
                "pass cp.labels(labels), with -100 where none is wanted, or that number as num_items_in_batch="
            )
        return made.total


def _adds_router_loss(model: Any, asked: bool | None) -> bool:
    return bool(getattr(model.config.get_text_config(decoder=True), "output_router_logits", False) if asked is None else asked)


def _version(x: Tensor) -> int:
    """How often it was written to; tensors of inference_mode do not know."""
    return 0 if x.is_inference() else x._version


class LabelsElsewhere:
    """What a model gets as its ``labels``, so that it computes a loss: they are in ``shift_labels``. A model that looks at it
    would have taken them for labels to shift."""

    def to(self, *_: Any, **__: Any) -> LabelsElsewhere:
        """Itself: models move labels to where the logits are."""
        return self

    def __getattr__(self, name: str) -> NoReturn:
        _refuse_own_loss()

    def __getitem__(self, index: Any) -> NoReturn:
        _refuse_own_loss()

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        _refuse_own_loss()


def _refuse_own_loss() -> NoReturn:
    raise UnsupportedError(
        "the model computes its loss from labels, not from shift_labels, so that it would shift them within this rank's rows. Call it "
        "without labels, and compute the loss from its logits and cp.labels(input_ids)"
    )
