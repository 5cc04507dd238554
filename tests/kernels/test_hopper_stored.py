"""The attention kernel for Hopper over keys that are stored in other numbers: the bits that it gives over a copy in q's dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from inputs.paged_keys import in_pages, make_case
from inputs.ragged_inputs import check, make_qkv
from inputs.stored_inputs import BF16, E4M3, E5M2, FP16, options_of, stored_keys
from torch import Tensor

from cpattn.exchange.message import KVFormat
from cpattn.keys import Keys
from cpattn.moves.stored_rows import StoredRows
from cpattn.spans import Spans

pytest.importorskip("triton")
from cpattn.kernels.ragged_attention import ragged_attention, specialized_kernel
from cpattn.kernels.tile_shapes import has_specialized, stored_blocks
from cpattn.moves import triton_moves

on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or specialized_kernel(torch.device("cuda")) is None, reason="needs a Hopper GPU, and a Triton for it"
)
# Keys of requests, one without any; queries of spans and their requests; how many keys they see. Whole tiles, single queries, blocks
# that are seen in part, and spans that see nothing, one after another.
LENS = [700, 0, 129, 5, 1300]
Q_LEN, REQUEST, SEES = [300, 1, 1, 1, 7, 129, 3, 900], [0, 1, 1, 1, 2, 2, 3, 4], [700, 0, 0, 0, 128, 129, 5, 1285]
SINKS = torch.tensor([0.5, -1.0, 3.0, 0.0, 0.1, 0.2, -4.0, 9.0])


def in_their_pages(keys: Keys, rows: Any, lens: list[int], page_size: int) -> tuple[Keys, Any]:
    """The keys in shuffled pages, all else in which is NaN, scales included; and the spans over them."""
    k_pages, v_pages, paged = in_pages(keys.k, keys.v, rows, lens, page_size, torch.int32, 5)
    given = Keys(k_pages, v_pages, paged.page_table, keys.k_scale, keys.v_scale)
    if keys.k_scale is not None and keys.k_scale.ndim == 2:
        assert keys.v_scale is not None
        k_scale, v_scale, _ = in_pages(keys.k_scale[..., None], keys.v_scale[..., None], rows, lens, page_size, torch.int32, 5)
        given = given._replace(k_scale=k_scale[..., 0], v_scale=v_scale[..., 0])
    return given, paged


def in_a_message(keys: Keys) -> Keys:
    """The keys as they travel: with scales of tokens heads begin at multiples of 8 bytes alone."""
    of_tokens = keys.k_scale is not None and keys.k_scale.ndim == 2
    num_keys, heads, head_dim = keys.k.shape
    kv = KVFormat(heads, head_dim, keys.v.shape[2], False, keys.k.dtype, keys.k.device, "token" if of_tokens else None)
    parts = kv.parts(torch.empty(num_keys, heads, kv.width, dtype=kv.wire_dtype, device=keys.k.device))
    for place, x in zip(kv.stored(*parts), keys[:2] + keys[3:5], strict=True):
        if place is not None and x is not None:
            place.copy_(x)
    return keys._replace(**{name: x for name, x in kv.keys(*parts)._asdict().items() if x is not None})


def attend(
    monkeypatch: pytest.MonkeyPatch, q: Tensor, keys: Keys, spans: Spans, options: dict[str, Any], into: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """By the kernel for Hopper, or it fails: a launch over these spans that is prepared here."""
    module = specialized_kernel(q.device)
    launched: list[Any] = []

    def launch(*given: Any, original: Any = module.launch, **named: Any) -> Any:
        launched.append(named)
        return original(*given, **named)

    monkeypatch.setattr(module, "launch", launch)
    result = ragged_attention(q, keys, spans, options_of(options, q.device), into=into)
    monkeypatch.undo()
    assert launched, "the plain kernel ran"
    return result


@on_hopper
@pytest.mark.parametrize(
    ("stored", "scales", "dtype", "dims", "page_size", "options"),
    [
        (E4M3, "head", BF16, (128, 128), 64, {}),
        (E4M3, "token", BF16, (128, 128), 1, {}),
        (E4M3, "token", FP16, (128, 128), 48, {"window": 200}),
        (E5M2, "head", FP16, (64, 64), 3, {"softcap": 5.0, "sinks": SINKS}),
        (E5M2, "token", BF16, (192, 128), 128, {"window": 33}),
        (E4M3, "token", BF16, (256, 256), 16, {}),
        (E4M3, "head", BF16, (80, 96), 256, {}),
        (BF16, "none", FP16, (128, 128), 16, {"sinks": SINKS}),
        (FP16, "none", BF16, (64, 128), 5, {"window": 129}),
        (BF16, "none", FP16, (72, 72), 16, {}),
    ],
    ids=str,
)
def test_bits_are_those_over_a_copy(
    stored: torch.dtype, scales: str, dtype: torch.dtype, dims: tuple[int, int], page_size: int, options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    rows = make_case(LENS, Q_LEN, REQUEST, SEES, "cuda")
    q, k, v = make_qkv(rows, sum(LENS), (8, 2), dims, dtype, "cuda", 1)
    keys = stored_keys(k, v, stored, scales)
    copy = torch.empty_like(k), torch.empty_like(v)
    triton_moves.dequantize(*copy, StoredRows(keys.k, keys.v, keys.k_scale, keys.v_scale))
    want, want_lse = attend(monkeypatch, q, Keys(*copy), rows, options)
    n = rows.num_queries
    check(q, *copy, rows, options_of(options, q.device), want, want_lse)
    paged_keys, paged = in_their_pages(keys, rows, LENS, page_size)
    assert paged_keys.page_table is not None
    of_int64 = paged_keys._replace(page_table=paged_keys.page_table.long())
    for given, spans in ((keys, rows), (in_a_message(keys), rows), (paged_keys, paged), (of_int64, paged)):
        attend(monkeypatch, q, given, spans, options)
        for _ in range(3):
            out, lse = ragged_attention(q, given, spans, options_of(options, q.device))
            assert torch.equal(out[:n], want[:n])
            assert torch.equal(lse[:n], want_lse[:n])
    acc, acc_lse = torch.randn(len(q), 8, dims[1], device="cuda"), torch.randn(len(q), 8, device="cuda")
    got, got_lse = acc.clone(), acc_lse.clone()
    attend(monkeypatch, q, Keys(*copy), rows, options, into=(acc, acc_lse))
    attend(monkeypatch, q, paged_keys, paged, options, into=(got, got_lse))
    assert torch.equal(got[:n], acc[:n])
    assert torch.equal(got_lse[:n], acc_lse[:n])


@on_hopper
@pytest.mark.parametrize("scales", ["head", "token"])
def test_many_short_items_after_each_other(scales: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than there are programs: each draws several, of one block, of some, and of none."""
    lens = [(1, 0, 130, 64, 400, 0, 128, 257)[i % 8] for i in range(400)]
    q_len = [(1, 2, 1, 70, 1, 1, 150, 1)[i % 8] for i in range(400)]
    rows = make_case(lens, q_len, list(range(400)), lens, "cuda")
    q, k, v = make_qkv(rows, sum(lens), (8, 2), (128, 128), BF16, "cuda", 2)
    keys = stored_keys(k, v, E4M3, scales)
    copy = torch.empty_like(k), torch.empty_like(v)
    triton_moves.dequantize(*copy, StoredRows(keys.k, keys.v, keys.k_scale, keys.v_scale))
    want, want_lse = attend(monkeypatch, q, Keys(*copy), rows, {})
    given, paged = in_their_pages(keys, rows, lens, 16)
    attend(monkeypatch, q, given, paged, {})
    for _ in range(5):
        out, lse = ragged_attention(q, given, paged, options_of({}, q.device))
        assert torch.equal(out[: rows.num_queries], want[: rows.num_queries])
        assert torch.equal(lse[: rows.num_queries], want_lse[: rows.num_queries])


def test_which_stored_keys_it_reads() -> None:
    """It copies 16 bytes at a time, and has to have room for them; pages may have any size."""
    hopper = (9, 0)
    for page_size in (0, 1, 64):
        assert has_specialized(128, 128, BF16, hopper, page_size, E4M3)
    assert not has_specialized(128, 128, BF16, hopper, 1)
    assert not has_specialized(72, 72, BF16, hopper, 64, E5M2)  # of 72 bytes
    assert has_specialized(72, 72, BF16, hopper, 64, FP16)
    assert not has_specialized(128, 128, torch.float32, hopper, 64, BF16)
    assert not has_specialized(576, 512, BF16, hopper, 64, E4M3)
    assert not has_specialized(128, 128, BF16, (10, 0), 64, E4M3)
    assert not has_specialized(256, 256, FP16, hopper, 64, BF16)
    assert [stored_blocks(dim, dim, E4M3) for dim in (64, 128, 256)] == [2, 2, 1]
    assert [stored_blocks(dim, dim, BF16) for dim in (64, 128, 256)] == [2, 1, 0]
