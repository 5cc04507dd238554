"""Prompts of different lengths, in the forms that users of transformers have them in, and their answers in the same form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cpattn.errors import CPError, RowCountError, TensorMismatchError

_FORMS = "pass [batch, length] with an attention_mask, or a list of prompts, each of its own length"


class Prompts(NamedTuple):
    """Attributes:
    ids: of each prompt, int64 ``[length]``, at least 1, without padding, on the model's device.
    padded: what they were given in, int64 ``[batch, length]``, or None where they were a list.
    """

    ids: list[Tensor]
    padded: Tensor | None

    def with_answers(self, answers: Sequence[Sequence[int]], pad_token_id: int | None) -> Tensor | list[Tensor]:
        """Each prompt with its answer after it: a list as they came, or as wide as the longest, padded on the right."""
        made = [torch.tensor(answer, dtype=torch.int64, device=ids.device) for ids, answer in zip(self.ids, answers, strict=True)]
        if self.padded is None:
            return [torch.cat([ids, answer]) for ids, answer in zip(self.ids, made, strict=True)]
        width = max(map(len, answers))
        # Answers of one length need no padding, and so no token for it.
        rest = self.padded.new_full((len(made), width), -1 if pad_token_id is None else pad_token_id)
        for line, answer in zip(rest, made, strict=True):
            line[: len(answer)] = answer
        return torch.cat([self.padded, rest], dim=1)


def parse_prompts(input_ids: Any, attention_mask: Any, padding: int | None, device: torch.device) -> Prompts:
    """Prompts from a padded tensor and its mask, or from a list of tensors or lists of integers.

    Args:
        padding: the token that is padding in a tensor without a mask, None where none is.

    Raises:
        TensorMismatchError: what are no integers. RowCountError: of another form. CPError: no prompt, or one without a token.
    """
    if isinstance(input_ids, Tensor):
        prompts = _of_tensor(input_ids, attention_mask, padding, device)
    elif attention_mask is not None:
        raise CPError("attention_mask with a list of prompts, which have no padding; leave it out")
    elif isinstance(input_ids, Sequence) and not isinstance(input_ids, str):
        prompts = Prompts([_of_one(number, prompt, device) for number, prompt in enumerate(input_ids)], None)
    else:
        # What a tokenizer returns is a mapping of both.
        forms = "pass what is in it by name: generate(model, **inputs, ...)" if isinstance(input_ids, Mapping) else _FORMS
        raise TensorMismatchError(f"input_ids is a {type(input_ids).__name__}; {forms}")
    if not prompts.ids:
        raise CPError("input_ids has no prompt; there is nothing to generate: skip the call on every rank")
    empty = [number for number, ids in enumerate(prompts.ids) if not len(ids)]
    if empty:
        raise CPError(f"prompt {empty[0]} has no token; begin it with one, such as the tokenizer's bos_token_id")
    return prompts


def check_vocabulary(prompts: Sequence[Tensor], size: int) -> None:
    """Raises CPError where a token id is not from 0 to size - 1. A rank that looked it up would fail alone, and the others wait."""
    # One look at the device, however many prompts there are.
    least, most = torch.stack(torch.cat(list(prompts)).aminmax()).tolist()
    if least >= 0 and most < size:
        return
    for number, ids in enumerate(prompts):
        outside = ((ids < 0) | (ids >= size)).nonzero().flatten().tolist()
        if outside:
            raise CPError(
                f"prompt {number} has the token id {int(ids[outside[0]])} in place {outside[0]}, padding not counted; the model's "
                f"embedding has ids 0 to {size - 1}: take the model's own tokenizer, or call model.resize_token_embeddings where "
                "tokens were added"
            )


def _of_tensor(input_ids: Tensor, attention_mask: Any, padding: int | None, device: torch.device) -> Prompts:
    _check_integers("input_ids", input_ids)
    if input_ids.ndim != 2:
        raise RowCountError(f"input_ids has shape {tuple(input_ids.shape)}; {_FORMS}")
    padded = input_ids.to(device, torch.int64)
    what = "attention_mask"
    if attention_mask is None:
        if padding is None:
            return Prompts(list(padded), padded)
        attention_mask = padded != padding
        what = f"there is no attention_mask, so that pad_token_id={padding} is padding, as in model.generate; the mask made of it"
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != input_ids.shape:
        given = f"of shape {tuple(attention_mask.shape)}" if isinstance(attention_mask, Tensor) else f"a {type(attention_mask).__name__}"
        raise RowCountError(f"attention_mask is {given}; pass one of the shape of input_ids, {tuple(input_ids.shape)}")
    mask = attention_mask.to("cpu") != 0
    lengths = mask.sum(1).tolist()
    if any(not bool(line[len(line) - length :].all()) for line, length in zip(mask, lengths, strict=True)):
        raise CPError(
            f"{what} has zeros after a token; padding goes on the left, where an answer does not follow it: make the prompts with "
            'tokenizer(..., padding=True, padding_side="left"), and pass their attention_mask, or a list of prompts without padding'
        )
    return Prompts([line[len(line) - length :] for line, length in zip(padded, lengths, strict=True)], padded)


def _of_one(number: int, prompt: Any, device: torch.device) -> Tensor:
    if isinstance(prompt, Sequence) and not isinstance(prompt, str) and all(type(token) is int for token in prompt):
        prompt = torch.tensor(prompt, dtype=torch.int64)
    if not isinstance(prompt, Tensor):
        raise TensorMismatchError(f"prompt {number} is a {type(prompt).__name__}; pass a tensor [length], or a list, of token ids")
    _check_integers(f"prompt {number}", prompt)
    if prompt.ndim != 1:
        raise RowCountError(f"prompt {number} has shape {tuple(prompt.shape)}; each prompt of a list is [length]")
    return prompt.to(device, torch.int64)


def _check_integers(name: str, ids: Tensor) -> None:
    if ids.dtype not in (torch.int64, torch.int32):
        raise TensorMismatchError(f"{name} is {ids.dtype}; token ids are int64 or int32")
