from __future__ import annotations

from collections.abc import Iterator

import pytest

from cpattn.testing import ProcessRanks


@pytest.fixture(scope="session")
def four_processes() -> Iterator[ProcessRanks]:
    """Started once; groups of 1 and 2 are the first of them."""
    with ProcessRanks(4, timeout=60) as started:
        yield started
