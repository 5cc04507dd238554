"""What check=True finds of calls that are out of order: a layer that one rank has skipped, swapped, or named otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import cpattn
from cpattn.testing import run_loopback

PLAN = cpattn.plan([(0, 9), (0, 4)], cp_size=3)


def error_of(call: Callable[[], Any]) -> str:
    with pytest.raises(cpattn.DisagreementError) as raised:
        call()
    return str(raised.value)


@pytest.mark.parametrize("what", ["cp_attention", "unshard", "gather_kv"])
def test_a_call_that_one_rank_has_skipped(what: str) -> None:
    """Unchecked calls count. Here the skipped one is over a plan without a row, so that nobody waits for it."""
    empty = cpattn.plan([], cp_size=3)

    def program(group: cpattn.Communicator) -> str:
        nothing, meta = empty.metadata(group.rank), PLAN.metadata(group.rank)
        x = torch.randn(meta.rows, 1, 8)
        if group.rank != 1:
            cpattn.cp_attention(x[:0], x[:0], x[:0], nothing, group=group)
        calls: dict[str, Callable[[], Any]] = {
            "cp_attention": lambda: cpattn.cp_attention(x, x, x, meta, group=group, check=True),
            "unshard": lambda: cpattn.unshard(x, meta, group=group, check=True),
            "gather_kv": lambda: cpattn.gather_kv(x, x, meta, group=group, check=True),
        }
        message = error_of(calls[what])
        # Whoever goes on has found the beat again.
        calls[what]()
        return message

    for message in run_loopback(program, 3, timeout=10):
        assert message.startswith(
            "the ranks disagree on the number of calls so far on this group: ranks 0, 2: 1; rank 1: 0; a rank has skipped"
        )


def test_swapped_layers_are_found_by_their_labels() -> None:
    def program(group: cpattn.Communicator) -> str:
        meta = PLAN.metadata(group.rank)
        x = torch.randn(meta.rows, 1, 8)
        cpattn.cp_attention(x, x, x, meta, group=group, check=True, label="layer 0")
        layers = [2, 1] if group.rank == 2 else [1, 2]
        return error_of(lambda: [cpattn.cp_attention(x, x, x, meta, group=group, check=True, label=f"layer {n}") for n in layers])

    for message in run_loopback(program, 3, timeout=10):
        assert message.startswith("the ranks disagree on the label of this call: ranks 0, 1: layer 1; rank 2: layer 2; a rank has skipped")


@pytest.mark.parametrize("label", [3, "x" * 101, "a\0b", b"layer"], ids=["int", "too long", "zero byte", "bytes"])
def test_what_is_no_label(label: Any) -> None:
    meta = cpattn.build_metadata([(0, 4)], 1, 0)
    x = torch.randn(4, 1, 8)
    for call in (
        lambda: cpattn.cp_attention(x, x, x, meta, label=label),
        lambda: cpattn.unshard(x, meta, label=label),
        lambda: cpattn.gather_kv(x, x, meta, label=label),
    ):
        with pytest.raises(cpattn.OptionError, match=r"label=.*pass a name of this call that is the same on every rank"):
            call()


def test_what_is_no_label_on_one_rank_raises_on_all() -> None:
    def program(group: cpattn.Communicator) -> str:
        meta = PLAN.metadata(group.rank)
        x = torch.randn(meta.rows, 1, 8)
        label: Any = 3 if group.rank == 1 else "layer 3"
        with pytest.raises(cpattn.OptionError) as raised:
            cpattn.cp_attention(x, x, x, meta, group=group, check=True, label=label)
        cpattn.cp_attention(x, x, x, meta, group=group, check=True, label="layer 3")
        return str(raised.value)

    messages = run_loopback(program, 3, timeout=10)
    assert messages[1].startswith("label=3; pass a name")
    assert messages[0] == messages[2] == f"rank 1 refused this call: {messages[1]}"


def test_gather_kv_compares_arguments() -> None:
    def program(group: cpattn.Communicator) -> str:
        meta = PLAN.metadata(group.rank)
        x = torch.randn(meta.rows, 1 + group.rank // 2, 8)
        return error_of(lambda: cpattn.gather_kv(x, x, meta, group=group, check=True))

    for message in run_loopback(program, 3, timeout=10):
        assert "the ranks disagree on the arguments: ranks 0, 1: gather_kv, 1 heads of 8/8" in message


def test_a_rank_that_fails_in_a_checked_call_raises_on_all() -> None:
    """Its own error there, and one that names it on the others, which would return NaN without the check."""

    def kernel(*arguments: Any, **options: Any) -> Any:
        raise MemoryError("no memory for this launch")

    def program(group: cpattn.Communicator) -> str:
        meta = PLAN.metadata(group.rank)
        x = torch.randn(meta.rows, 1, 8)
        backend: Any = kernel if group.rank == 1 else "reference"
        if group.rank == 1:
            with pytest.raises(MemoryError):
                cpattn.cp_attention(x, x, x, meta, group=group, check=True, backend=backend, strategy="ring")
            message = ""
        else:
            message = error_of(lambda: cpattn.cp_attention(x, x, x, meta, group=group, check=True, backend=backend, strategy="ring"))
        cpattn.cp_attention(x, x, x, meta, group=group, check=True)
        return message

    first, second, third = run_loopback(program, 3, timeout=10)
    assert second == ""
    assert first == third == "rank 1 failed in the middle of this call; its own error says why"
