"""A stand-in for an optional package, as test suites and engines put into sys.modules, is no package: find_spec raises for it."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from cpattn.attention.flash_varlen import missing
from cpattn.kernels.available import is_installed


@pytest.mark.parametrize("stand_in", [ModuleType("triton"), None], ids=["no spec", "None"])
def test_a_stand_in_is_not_installed(stand_in: ModuleType | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", stand_in)
    assert not is_installed("triton")
    assert missing.__wrapped__("triton", "pip install it") == "triton is not installed; pip install it"


def test_what_is_there_and_what_is_not() -> None:
    assert is_installed("numpy")
    assert not is_installed("no_such_package.no_such_module")
