from __future__ import annotations

from collections.abc import Iterator

import pytest

from cpattn.testing import ProcessRanks


@pytest.fixture(scope="module", params=[2, 3], ids=lambda size: f"{size} processes")
def ranks(request: pytest.FixtureRequest) -> Iterator[ProcessRanks]:
    """Real processes over gloo, started once for all tests of a module."""
    with ProcessRanks(request.param, timeout=60) as started:
        yield started
