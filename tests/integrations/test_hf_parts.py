"""The pure parts of the adapter: which masks it takes, and where last tokens lie."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import masking_utils

import cpattn
from cpattn.integrations.transformers.last_rows import last_rows
from cpattn.integrations.transformers.masks import CausalMask, describe_mask


def packed_causal_mask_function() -> masking_utils.Callable:
    """That of several sequences in one row, by what transformers has for it: 5.20, the last for Python 3.10, puts two masks together."""
    sequences = torch.zeros(1, 5, dtype=torch.int64)
    if hasattr(masking_utils, "packed_sequence_compatibility_function"):
        return masking_utils.packed_sequence_compatibility_function(masking_utils.causal_mask_function, sequences, sequences)
    return masking_utils.and_masks(masking_utils.packed_sequence_mask_function(sequences), masking_utils.causal_mask_function)


@pytest.mark.parametrize("window", [None, 1, 2, 7, 4096])
def test_causal_masks_are_taken(window: int | None) -> None:
    function = masking_utils.causal_mask_function if window is None else masking_utils.sliding_window_causal_mask_function(window)
    assert describe_mask(function, window, overlaid=False) == CausalMask(window)
    with pytest.raises(cpattn.UnsupportedError, match="that is not causal"):
        describe_mask(function, window, overlaid=True)


@pytest.mark.parametrize(
    ("function", "size"),
    [
        (masking_utils.bidirectional_mask_function, None),
        (masking_utils.sliding_window_bidirectional_mask_function(7), 7),
        (masking_utils.chunked_causal_mask_function(7, torch.zeros(1, dtype=torch.int64)), 7),
        (masking_utils.sliding_window_causal_mask_function(7), 8),
        (masking_utils.sliding_window_causal_mask_function(7), None),
        (masking_utils.causal_mask_function, 7),
        (packed_causal_mask_function(), None),
    ],
    ids=["bidirectional", "bidirectional window", "chunked", "longer window", "forgotten window", "no window", "packed"],
)
def test_other_masks_are_refused(function: masking_utils.Callable, size: int | None) -> None:
    with pytest.raises(cpattn.UnsupportedError, match="that is not causal, with or without a sliding window"):
        describe_mask(function, size, overlaid=False)


def test_a_mask_can_be_sliced_to_all_of_its_rows() -> None:
    mask = CausalMask(7)
    assert mask[:, :, 0:, :] is mask
    with pytest.raises(cpattn.UnsupportedError, match=r"cuts queries off.*last_only=True"):
        mask[:, :, -1:, :]


@pytest.mark.parametrize("partition", ["zigzag", "contiguous", "whole"])
@pytest.mark.parametrize("cp_size", [1, 2, 3, 8])
@pytest.mark.parametrize("lengths", [[1], [0, 1, 0], [23, 1, 0, 2, 5, 16, 3], [1] * 11], ids=str)
def test_last_rows(lengths: list[int], cp_size: int, partition: str) -> None:
    plan = cpattn.plan([(0, length) for length in lengths], cp_size, partition=partition, pad_to=4)
    tokens = torch.arange(plan.num_tokens)
    gathered = []
    for rank in range(cp_size):
        meta = plan.metadata(rank)
        last = last_rows(meta)
        assert last_rows(meta) is last
        gathered.append(cpattn.shard(tokens, meta)[last.keep])
    assert len({len(kept) for kept in gathered}) == 1
    with_tokens = np.flatnonzero(lengths)
    assert last.request.tolist() == with_tokens.tolist()
    assert torch.cat(gathered)[last.place].tolist() == (np.cumsum(lengths) - 1)[with_tokens].tolist()


def test_last_rows_of_a_bucket_are_those_of_the_batch_in_it() -> None:
    plans = [cpattn.plan([(0, length) for length in lengths], 2) for lengths in ([3, 9], [1, 1, 7])]
    meta = plans[0].metadata(1, bucket=cpattn.Bucket(max_requests=4, max_rows=16, max_chunks=8))
    for plan in plans:
        meta.copy_(plan)
        for given, expected in zip(last_rows(meta), last_rows(plan.metadata(1)), strict=True):
            assert torch.equal(given, expected)
