"""What the oracle takes for a batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cpattn.testing import oracle_attention

FORMS: dict[str, Any] = {"array": np.array, "tensor": torch.tensor, "iterator": iter}


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_may_be_in_any_form(form: str) -> None:
    """Of an iterator nothing is left for who reads it again."""
    q, k, v = torch.randn(5, 2, 4), torch.randn(5, 1, 4), torch.randn(5, 1, 4)
    batch = [(0, 3), (2, 2)]
    expected = oracle_attention(q, k, v, batch, prefix_k=k[:2], prefix_v=v[:2])
    assert expected[0].any(dim=-1).all()
    for x, y in zip(oracle_attention(q, k, v, FORMS[form](batch), prefix_k=k[:2], prefix_v=v[:2]), expected, strict=True):
        assert torch.equal(x, y)
