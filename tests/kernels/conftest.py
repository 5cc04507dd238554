from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="session")
def device() -> str:
    """Where kernels run: on a GPU, or in Triton's interpreter."""
    return "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
