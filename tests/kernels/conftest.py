from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session")
def device() -> str:
    """Where kernels run: on a GPU, or in Triton's interpreter."""
    return "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


@pytest.fixture(scope="session", autouse=True)
def quick_calls_within_kernels(device: str) -> Iterator[None]:
    """For each call of a function within a kernel the interpreter looks through the whole language for what it has to replace,
    which a launch has done already, and which takes a third of all its time."""
    if device != "cpu":
        yield
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    core = pytest.importorskip("triton.language.core")
    replace, scope = getattr(interpreter, "_patch_lang", None), getattr(interpreter, "_LangPatchScope", None)
    if replace is None or scope is None:
        yield
        return

    def replace_once(function: Any) -> Any:
        seen = [value for value in function.__globals__.values() if value is interpreter.tl or value is core]
        done = bool(seen) and not any(core.is_builtin(language.load) for language in seen)
        return scope() if done else replace(function)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", replace_once)
        yield


@pytest.fixture
def peer_kernels(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels over peers' memory in the interpreter, which has no assembler; its programs run one after another, and it is not made
    for threads."""
    if device != "cpu":
        return
    pytest.importorskip("triton")
    from devices.interpreted_peers import without_assembler

    from cpattn.kernels import launch

    without_assembler(monkeypatch)
    call, one_at_a_time = launch._Prepared.__call__, threading.Lock()

    def launch_alone(prepared: Any, *tensors: Any) -> None:
        with one_at_a_time:
            call(prepared, *tensors)

    monkeypatch.setattr(launch._Prepared, "__call__", launch_alone)
