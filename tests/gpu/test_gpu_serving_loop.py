"""Steps of tests/serving_loop.py with pages and kernels on a GPU: every page is compared after each."""

from __future__ import annotations

import pytest
import serving_loop


@pytest.mark.parametrize("number", range(12))
def test_a_few_steps(number: int) -> None:
    """Each owner rule, in bf16 and fp8, twice."""
    assert serving_loop.serve_on_loopback(serving_loop.draw(4, number, device="cuda"), steps=20).total() == 20
