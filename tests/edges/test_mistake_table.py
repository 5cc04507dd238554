"""Every mistake of the table raises its error, with what was passed, the rule and the fix in one line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from inputs import mistake_cases
from inputs.mistake_cases import MISTAKES, Mistake

import cpattn
from cpattn.testing import run_loopback


@pytest.fixture(scope="module")
def given() -> Iterator[dict[str, Any]]:
    with mistake_cases.names() as found:
        yield found


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.code)
def test_a_mistake_is_refused(mistake: Mistake, given: dict[str, Any]) -> None:
    message = mistake_cases.message(mistake, given)
    assert mistake.says in message
    assert "\n" not in message


KINDS = ["dt(x)", "fake(x)", "masked(x)", "x.to_sparse()", "x.to_mkldnn()", "quantized(x)", "wrapped(x)"]


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors")
@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_refused_after_a_plain_call_of_the_same_shape(kind: str, given: dict[str, Any]) -> None:
    """What was decided of a plain tensor is no decision about one that only looks like it."""
    q, k, v, meta = (given[name] for name in ("q", "k", "v", "meta"))
    cpattn.cp_attention(q, k, v, meta)
    for place, name in enumerate("qkv"):
        tensors: list[Any] = [q, k, v]
        tensors[place] = eval(kind, {**given, "x": tensors[place]})
        with pytest.raises(cpattn.TensorMismatchError, match=f"^{name} (is|has) "):
            cpattn.cp_attention(tensors[0], tensors[1], tensors[2], meta)


def test_a_mistake_in_a_checked_call_is_told_to_the_other_ranks() -> None:
    """An argument that does not exist is refused where all others are: with ``check=True`` no rank waits for the one that made it."""

    def program(group: cpattn.Communicator) -> str:
        meta = cpattn.build_metadata([(0, 8)], 2, group.rank)
        q = torch.zeros(4, 2, 8)
        words: dict[str, Any] = {"is_causal": True} if group.rank else {}
        with pytest.raises(cpattn.CPError) as raised:
            cpattn.cp_attention(q, q, q, meta, group=group, check=True, **words)
        return str(raised.value)

    told, own = run_loopback(program, 2, timeout=20)
    assert "is_causal: attention is always causal here; leave it out" in own
    assert "rank 1 refused this call: " in told


def test_parameters_and_plain_subclasses_are_tensors() -> None:
    class Plain(torch.Tensor):
        """Without a dispatch of its own."""

    meta = cpattn.build_metadata([(0, 6)], 1, 0)
    x = torch.randn(6, 2, 8)
    expected = cpattn.cp_attention(x, x, x, meta)
    for kind in (torch.nn.Parameter(x, requires_grad=False), x.as_subclass(Plain)):
        assert torch.equal(cpattn.cp_attention(kind, x, x, meta), expected)
        assert torch.equal(cpattn.shard(kind, meta), x)
