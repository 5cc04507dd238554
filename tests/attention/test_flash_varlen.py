"""The FlashAttention wrappers where no such package is: the calls that they build, recorded, and how results are evened out."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from cpattn.attention import flash_attn2, flash_attn4
from cpattn.attention.backend import AttentionOptions
from cpattn.attention.flash_varlen import varlen_call
from cpattn.attention.registry import BACKENDS
from cpattn.keys import Keys
from cpattn.spans import Spans

KEYS = Keys(torch.zeros(20, 2, 16), torch.zeros(20, 2, 16))
CAUSAL = Spans.build(*np.array([(3, 0, 5, 3), (4, 2, 9, 6)]).T)
FULL = Spans.build(*np.array([(3, 0, 5, 5), (4, 2, 0, 0)]).T)
MIXED = Spans.build(*np.array([(3, 0, 5, 3), (4, 2, 9, 9)]).T)


FLASH_ATTENTION_2 = "_flash_attn_varlen_forward"


# The signatures of the packages' functions, of the versions named; a call that they would not take fails here.
def flash_attn_2_8_3(
    q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: Any, max_seqlen_k: Any, dropout_p: Any, softmax_scale: Any,
    causal: Any, window_size_left: Any = -1, window_size_right: Any = -1, softcap: Any = 0.0, alibi_slopes: Any = None,
    return_softmax: Any = False, block_table: Any = None, leftpad_k: Any = None, seqused_k: Any = None, zero_tensors: Any = False,
) -> None: ...  # fmt: skip


def flash_attn_4_0_0b36(
    q: Any, k: Any, v: Any, qv: Any = None, cu_seqlens_q: Any = None, cu_seqlens_k: Any = None, max_seqlen_q: Any = None,
    max_seqlen_k: Any = None, min_seqlen_k: Any = None, seqused_q: Any = None, seqused_k: Any = None, gather_kv_indices: Any = None,
    page_table: Any = None, softmax_scale: Any = None, causal: Any = False, window_size: Any = (None, None), learnable_sink: Any = None,
    softcap: Any = 0.0, num_splits: Any = 1, pack_gqa: Any = None, deterministic: Any = False, return_lse: Any = False,
) -> None: ...  # fmt: skip


PACKAGES = [
    pytest.param(
        flash_attn2.flash_attn2_attention,
        "flash_attn.flash_attn_interface",
        "_flash_attn_varlen_forward",
        flash_attn_2_8_3,
        lambda call: (call["window_size_left"], call["window_size_right"]),
        -1,
        id="flash_attn2",
    ),
    pytest.param(
        flash_attn4.flash_attn4_attention,
        "flash_attn.cute",
        "flash_attn_varlen_func",
        flash_attn_4_0_0b36,
        lambda call: call["window_size"],
        None,
        id="flash_attn4",
    ),
]


@pytest.mark.parametrize(("run", "module", "function", "signature", "window_of", "no_side"), PACKAGES)
@pytest.mark.parametrize("rows", [pytest.param(CAUSAL, id="causal"), pytest.param(FULL, id="full")])
@pytest.mark.parametrize("window", [None, 4])
def test_the_package_is_called_as_its_signature_says(
    monkeypatch: pytest.MonkeyPatch,
    run: Callable[..., Any],
    module: str,
    function: str,
    signature: Callable[..., None],
    window_of: Callable[[dict[str, Any]], tuple[int, int]],
    no_side: int | None,
    rows: Spans,
    window: int | None,
) -> None:
    if window is not None and rows is FULL:
        pytest.skip("a window needs rows aligned to the bottom right")
    recorded: dict[str, Any] = {}
    out_HT_lse = torch.randn(7, 4, 16), torch.tensor([[torch.inf, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]).repeat(4, 1)

    def record(*args: Any, **kwargs: Any) -> Any:
        recorded.update(inspect.signature(signature).bind(*args, **kwargs).arguments)
        return out_HT_lse

    package = ModuleType(module)
    setattr(package, function, record)
    parent = module.split(".")[0]
    monkeypatch.setitem(sys.modules, parent, ModuleType(parent) if "." in module else package)
    monkeypatch.setitem(sys.modules, module, package)

    q, k, v = torch.randn(7, 4, 16), torch.randn(20, 2, 16), torch.randn(20, 2, 16)
    options = AttentionOptions(scale=0.5, window=window, softcap=3.0)
    out, lse = run(q, Keys(k, v), rows, options, torch.bfloat16)

    assert recorded["q"] is q
    assert recorded["cu_seqlens_q"].tolist() == [0, 3, 7]
    assert recorded["cu_seqlens_k"][:-1].tolist() == [0, 2]
    assert recorded["seqused_k"].tolist() == rows.k_len.tolist()
    assert (recorded["max_seqlen_q"], recorded["max_seqlen_k"]) == (4, rows.max_seqlen_k)
    assert recorded["causal"] == (rows is CAUSAL)
    assert tuple(window_of(recorded)) == ((no_side, no_side) if window is None else (3, 0))
    assert (recorded["softmax_scale"], recorded["softcap"]) == (0.5, 3.0)
    assert out is out_HT_lse[0]
    assert lse.shape == (7, 4)
    # +inf is what FlashAttention 2 says of a row without keys; without such a row there is nothing to put right.
    assert lse[0, 0] == (-torch.inf if rows is FULL and function == FLASH_ATTENTION_2 else torch.inf)
    assert lse[1, 0] == 1.0


@pytest.mark.parametrize("paged", [False, True], ids=["keys side by side", "pages"])
def test_flash_attn4_packs_the_heads_of_short_chunks(monkeypatch: pytest.MonkeyPatch, paged: bool) -> None:
    packed = []
    monkeypatch.setattr(flash_attn4, "launch", lambda q, keys, spans, options, pack_gqa: packed.append(pack_gqa))
    for length, heads in ((1, 4), (512, 4), (1, 2)):
        q_len, k_start, k_len, diagonal = (np.array([value]) for value in (length, 0, 512, 513 - length))
        spans = Spans.build(q_len, k_start, k_len, diagonal)
        q = torch.randn(length, heads, 16)
        k = torch.randn(*((32, 16) if paged else (512,)), 2, 16)
        keys = Keys(k, k, torch.arange(32, dtype=torch.int32)[None] if paged else None)
        flash_attn4.flash_attn4_attention(q, keys, spans, AttentionOptions(scale=1.0), torch.bfloat16)
    # One token for a group of 2; a long chunk; no group.
    assert packed == [True, False, False]


def test_rows_that_these_kernels_can_not_express_never_reach_one() -> None:
    for rows, window in ((MIXED, None), (FULL, 4)):
        with pytest.raises(ValueError, match="are not for a FlashAttention kernel"):
            varlen_call(KEYS, rows, AttentionOptions(scale=1.0, window=window))


@pytest.mark.parametrize(
    ("name", "fix"),
    [("flash_attn2", r"cpattn\[fa2\]"), ("flash_attn3", r"cpattn\[fa3\].* hopper folder"), ("flash_attn4", r"cpattn\[fa4\]")],
)
def test_a_missing_package_is_named_with_what_brings_it(name: str, fix: str) -> None:
    reason = BACKENDS[name].unavailable()
    if reason is None:
        pytest.skip(f"{name} is installed here")
    assert "is not installed" in reason
    with pytest.raises(AssertionError, match=fix):
        raise AssertionError(reason)
