"""Whether a module is there: also where somebody has put one into sys.modules that no loader has made."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch

from cpattn.attention import flash_varlen
from cpattn.cli import env
from cpattn.installed import is_installed
from cpattn.kernels import available


def test_modules_and_packages() -> None:
    assert is_installed("json")
    assert is_installed("json.decoder")
    assert not is_installed("json.there_is_none")
    assert not is_installed("there_is_none")
    assert not is_installed("there_is_none.of_these")


def test_none_in_its_place_is_no_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "made_by_hand", None)
    assert not is_installed("made_by_hand")


@pytest.mark.parametrize("spec", [None, "deleted"])
def test_a_module_without_a_spec_is_there(monkeypatch: pytest.MonkeyPatch, spec: ModuleSpec | str | None) -> None:
    """As test doubles are, and what some packages put in place of themselves."""
    stub = ModuleType("made_by_hand")
    if spec == "deleted":
        del stub.__spec__
    monkeypatch.setitem(sys.modules, "made_by_hand", stub)
    monkeypatch.setitem(sys.modules, "triton", stub)
    assert is_installed("made_by_hand")
    assert not is_installed("made_by_hand.part")
    assert flash_varlen.missing.__wrapped__("made_by_hand", "") is None
    assert available.has_kernels.__wrapped__(torch.device("cuda"))
    assert env._exists("made_by_hand")
