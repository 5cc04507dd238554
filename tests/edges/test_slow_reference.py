"""Where "auto" is left with the reference backend on a GPU, one warning says what that will take."""

from __future__ import annotations

import dataclasses
import re
import warnings

import pytest
import torch
from inputs.problems import CAUSAL, problem

import cpattn
from cpattn.attention.auto import able_backends
from cpattn.call import slow_reference
from cpattn.call.slow_reference import warn_of_reference
from cpattn.problem import Problem

# Head dims that no kernel of such a GPU has.
WIDE = problem(torch.device("cuda", 0), torch.bfloat16, q_heads=32, head_dim=512, v_head_dim=512)


@pytest.fixture(autouse=True)
def _nothing_was_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow_reference, "_warned", set())
    for module in ("flash_varlen", "auto", "triton", "flash_attn2", "flash_attn3", "flash_attn4", "torch_flash"):
        monkeypatch.setattr(f"cpattn.attention.{module}.capability", lambda device: (8, 0), raising=False)


def warned(asked: Problem, meta: cpattn.CPMetadata) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        warn_of_reference(able_backends("auto", asked, CAUSAL)[0], asked, meta)
    return [str(warning.message) for warning in found]


def test_the_warning_names_memory_and_time() -> None:
    meta = cpattn.build_metadata([(0, 8192)], 2, 1)
    assert able_backends("auto", WIDE, CAUSAL)[0].name == "reference"
    (message,) = warned(WIDE, meta)
    assert message.startswith("backend='auto' is left with 'reference', which is plain torch, for heads of 512/512 in bfloat16 on cuda:0")
    memory, seconds = re.findall(r"about ([\d.e+-]+) GiB beside the tensors, and ([\d.e+-]+) s in each layer at least", message)[0]
    # Three score matrices of a block of 512 queries and 32 heads, and K and V in fp32.
    longest = meta.max_seqlen_k
    assert float(memory) == pytest.approx((3 * 512 * 32 + 8 * 1024) * longest * 4 / 2**30, rel=0.05)
    assert 0.01 < float(seconds) < 1
    assert "cpattn.explain(q, k, v, meta) says why" in message
    assert "backend='reference' asks for it without this warning" in message


def test_it_is_given_once_for_each_kind_of_call() -> None:
    meta = cpattn.build_metadata([(0, 64)], 1, 0)
    assert len(warned(WIDE, meta)) == 1
    assert warned(WIDE, meta) == []
    assert warned(WIDE, cpattn.build_metadata([(0, 65)], 1, 0)) == []
    assert len(warned(dataclasses.replace(WIDE, dtype=torch.float16), meta)) == 1


def test_nothing_is_said_of_kernels_or_of_a_cpu() -> None:
    meta = cpattn.build_metadata([(0, 64)], 1, 0)
    assert warned(dataclasses.replace(WIDE, head_dim=128, v_head_dim=128), meta) == []
    assert warned(dataclasses.replace(WIDE, device=torch.device("cpu"), softcap=3.0), meta) == []


def test_a_call_asks_for_the_warning_where_it_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for "auto" and each decision, and not at all where the backend was named."""
    asked: list[str] = []
    monkeypatch.setattr("cpattn.call.find.warn_of_reference", lambda backend, *rest: asked.append(backend.name))
    meta = cpattn.build_metadata([(0, 9)], 1, 0)
    q = torch.randn(9, 2, 16)
    for backend, expected in (("reference", 0), ("auto", 1), ("auto", 1)):
        cpattn.cp_attention(q, q, q, meta, backend=backend, softcap=3.0)
        assert asked == ["reference"] * expected
