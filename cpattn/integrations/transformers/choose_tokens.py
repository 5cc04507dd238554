"""The next token of each request, from its logits: the likeliest, or one drawn by a number that all ranks know.

Each token is chosen once, by the rank that computed its logits, and that rank sends it to the others. So all ranks have
the same tokens, whatever their devices round, and no logits travel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from cpattn.errors import CPError
from cpattn.integrations.transformers.batch_context import BatchContext
from cpattn.integrations.transformers.last_rows import last_rows
from cpattn.transports.gather import gather_whole
from cpattn.transports.in_flight import InFlight
from cpattn.transports.transport import Transport


def next_tokens(context: BatchContext, transport: Transport, logits: Tensor, warpers: LogitsProcessorList, draws: Tensor | None) -> Tensor:
    """int64 ``[num_requests]``, the same on every rank; -1 where none can be drawn (:func:`check_chosen`). A collective call.

    Args:
        context: of a batch in which every request has a token.
        logits: ``[1, n, vocab]``, as the model returned them for inputs with ``last_only``.
        draws: float64 ``[num_requests]`` from [0, 1), the same on every rank, or None for the likeliest tokens.
    """
    last = last_rows(context.meta)
    rows = context.rows_of(logits, len(last.keep))
    if draws is not None:
        # Of the rows of all ranks, one after another; those that hold no last token may be drawn by anything.
        everyones = draws.new_zeros(transport.size * len(last.keep)).index_copy_(0, last.place.long(), draws)
        draws = everyones.view(transport.size, -1)[transport.rank]
    chosen = choose(rows, warpers, draws)
    with InFlight(transport, rows.device) as in_flight:
        return gather_whole(in_flight, "next tokens", chosen).index_select(0, last.place)


def choose(logits: Tensor, warpers: LogitsProcessorList, draws: Tensor | None) -> Tensor:
    """int64 ``[n]`` from logits ``[n, vocab]``, with a number from [0, 1) for each where tokens are drawn.

    >>> logits = torch.tensor([[0.0, 1.0, 1.0], [0.0, -torch.inf, 0.0]])
    >>> choose(logits, LogitsProcessorList(), None)
    tensor([1, 0])
    >>> choose(logits, LogitsProcessorList(), torch.tensor([0.0, 0.5], dtype=torch.float64))
    tensor([0, 2])

    Where logits are not finite, so that tokens have no probabilities, none can be drawn, and it is -1.
    """
    # As transformers does it before it looks at logits.
    logits = logits.float()
    if draws is None:
        return logits.argmax(-1)
    # Warpers look at no tokens.
    warped = warpers(None, logits.clone())
    sums = warped.double().softmax(-1).cumsum(-1)
    # The first token whose sum is larger than the number. It has a probability, and the last sum is 1, so that there is one.
    last = sums[:, -1:]
    drawn = torch.searchsorted(sums / last, draws[:, None].contiguous(), right=True)
    return drawn.where(last.isfinite(), -1)[:, 0]


def check_chosen(tokens: Sequence[int], prompts: Sequence[int]) -> None:
    """Raises CPError where the token of one of these prompts could not be drawn: on every rank, as all have the same tokens."""
    wrong = [prompt for token, prompt in zip(tokens, prompts, strict=True) if token < 0]
    if wrong:
        raise CPError(
            f"the logits of prompt {wrong[0]} are not finite (NaN or inf), so that no token can be drawn. Look for what overflows in "
            "the model, which may need bfloat16 or float32 where it runs in float16; or pass a temperature that is not so small"
        )
