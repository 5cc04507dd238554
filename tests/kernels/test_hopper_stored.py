"""The attention kernel for Hopper over keys that are stored in other numbers.

With scales of tokens, and of half precision, it gives the bits that it gives over a copy in q's dtype. Other fp8 it multiplies in fp16
without scales: closer to what the stored numbers mean, and with the same bits wherever they lie.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from inputs.paged_keys import in_pages, make_case
from inputs.ragged_inputs import check, make_qkv
from inputs.stored_inputs import BF16, E4M3, E5M2, FP16, options_of, stored_keys
from programs.compiling import said_by_compiling
from torch import Tensor

from cpattn.exchange.message import KVFormat
from cpattn.keys import Keys
from cpattn.moves.stored_rows import StoredRows
from cpattn.spans import Spans

pytest.importorskip("triton")
from cpattn.kernels.ragged_attention import ragged_attention, specialized_kernel
from cpattn.kernels.tile_shapes import has_specialized, stored_blocks, stored_shapes
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
    monkeypatch: pytest.MonkeyPatch, q: Tensor, keys: Keys, spans: Spans, options: dict[str, Any], **how: Any
) -> tuple[Tensor, Tensor]:
    """By the kernel for Hopper, or it fails: a launch over these spans that is prepared here."""
    module = specialized_kernel(q.device)
    launched: list[Any] = []

    def launch(*given: Any, original: Any = module.launch, **named: Any) -> Any:
        launched.append(named)
        return original(*given, **named)

    monkeypatch.setattr(module, "launch", launch)
    result = ragged_attention(q, keys, spans, options_of(options, q.device), **how)
    monkeypatch.undo()
    assert launched, "the plain kernel ran"
    return result


@on_hopper
@pytest.mark.parametrize(
    ("stored", "scales", "dtype", "dims", "page_size", "options"),
    [
        (E4M3, "token", BF16, (128, 128), 1, {}),
        (E4M3, "token", FP16, (128, 128), 48, {"window": 200}),
        (E5M2, "token", FP16, (64, 64), 3, {"softcap": 5.0, "sinks": SINKS}),
        (E5M2, "token", BF16, (192, 128), 128, {"window": 33}),
        (E4M3, "token", BF16, (256, 256), 16, {}),
        (E4M3, "token", BF16, (80, 96), 256, {}),
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
    for shape in stored_shapes(*dims, dtype, stored):
        out, lse = attend(monkeypatch, q, paged_keys, paged, options, shapes=(shape,))
        assert torch.equal(out[:n], want[:n])
        assert torch.equal(lse[:n], want_lse[:n])
    acc, acc_lse = torch.randn(len(q), 8, dims[1], device="cuda"), torch.randn(len(q), 8, device="cuda")
    got, got_lse = acc.clone(), acc_lse.clone()
    attend(monkeypatch, q, Keys(*copy), rows, options, into=(acc, acc_lse))
    attend(monkeypatch, q, paged_keys, paged, options, into=(got, got_lse))
    assert torch.equal(got[:n], acc[:n])
    assert torch.equal(got_lse[:n], acc_lse[:n])


def meant_by(keys: Keys) -> tuple[Tensor, Tensor]:
    """The stored numbers times their scales, in float64."""
    numbers = keys.k.float().double(), keys.v.float().double()
    if keys.k_scale is None or keys.v_scale is None:
        return numbers
    k_scale, v_scale = (scale.double()[..., None] for scale in (keys.k_scale, keys.v_scale))
    return numbers[0] * k_scale, numbers[1] * v_scale


@on_hopper
@pytest.mark.parametrize(
    ("stored", "scales", "dtype", "dims", "page_size", "options"),
    [
        (E4M3, "head", BF16, (128, 128), 64, {}),
        (E4M3, "head", FP16, (128, 128), 1, {"window": 200}),
        (E5M2, "head", FP16, (64, 64), 3, {"softcap": 5.0, "sinks": SINKS}),
        (E5M2, "none", BF16, (192, 128), 128, {"window": 33}),
        (E4M3, "head", BF16, (256, 256), 16, {"softcap": 2.0}),
        (E4M3, "none", BF16, (80, 96), 256, {"sinks": SINKS}),
        (E4M3, "head", BF16, (64, 128), 5, {"window": 129}),
    ],
    ids=str,
)
def test_products_in_half_precision(
    stored: torch.dtype, scales: str, dtype: torch.dtype, dims: tuple[int, int], page_size: int, options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Weights in fp16 and a result in fp32, beside which nothing is rounded: not keys, as a copy in bf16 would be."""
    rows = make_case(LENS, Q_LEN, REQUEST, SEES, "cuda")
    q, k, v = make_qkv(rows, sum(LENS), (8, 2), dims, dtype, "cuda", 1)
    # Of all magnitudes that do not change what is seen: a row of q times a power of two is a row of scores times it.
    q[::3] *= 2.0**-9 if dtype == FP16 else 2.0**-60
    q[1::5] = 0
    keys = stored_keys(k, v, stored, scales)
    given_options = options_of(options, q.device)
    n = rows.num_queries
    want, want_lse = attend(monkeypatch, q, keys, rows, options, out_dtype=torch.float32)
    check(q, *meant_by(keys), rows, given_options, want, want_lse, weights=FP16)
    paged_keys, paged = in_their_pages(keys, rows, LENS, page_size)
    for given, spans in ((in_a_message(keys), rows), (paged_keys, paged)):
        attend(monkeypatch, q, given, spans, options, out_dtype=torch.float32)
        for _ in range(3):
            out, lse = ragged_attention(q, given, spans, given_options, torch.float32)
            assert torch.equal(out[:n], want[:n])
            assert torch.equal(lse[:n], want_lse[:n])
    # Queries that no descriptor can take, with the other sign: that of the scale is their own.
    apart = torch.cat([-q, -q, -q[..., :1]], dim=2)[..., : dims[0]]
    opposite = replace(given_options, scale=-given_options.scale)
    out, lse = ragged_attention(apart, paged_keys, paged, opposite, torch.float32)
    assert torch.equal(out[:n], want[:n])
    assert torch.equal(lse[:n], want_lse[:n])
    for shape in stored_shapes(*dims, dtype, stored):
        out, lse = attend(monkeypatch, q, paged_keys, paged, options, out_dtype=torch.float32, shapes=(shape,))
        assert torch.equal(out[:n], want[:n])
        assert torch.equal(lse[:n], want_lse[:n])
    rounded, _ = ragged_attention(q, paged_keys, paged, given_options)
    assert torch.equal(rounded[:n], want[:n].to(dtype))
    acc, acc_lse = torch.zeros(len(q), 8, dims[1], device="cuda"), torch.full((len(q), 8), -torch.inf, device="cuda")
    ragged_attention(q, paged_keys, paged, given_options, into=(acc, acc_lse))
    assert torch.equal(acc[:n], want[:n])
    assert torch.equal(acc_lse[:n], want_lse[:n])


@on_hopper
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_scales_of_any_sign_and_size(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    lens = [300, 40]
    rows = make_case(lens, [100, 40], [0, 1], lens, "cuda")
    q, k, v = make_qkv(rows, sum(lens), (8, 4), (128, 128), dtype, "cuda", 3, padding=0)
    of_k, of_v = ([-0.02, 0.0, 1e-44, 0.03], [0.03, -0.5, 1e-3, 0.0])
    keys = stored_keys(k, v, E4M3, "none")._replace(k_scale=torch.tensor(of_k, device="cuda"), v_scale=torch.tensor(of_v, device="cuda"))
    q[5:50] = 0
    out, lse = attend(monkeypatch, q, keys, rows, {}, out_dtype=torch.float32)
    check(q, *meant_by(keys), rows, options_of({}, q.device), out, lse, weights=FP16)


@on_hopper
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "sinks": SINKS}], ids=["plain", "softcap and sinks"])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_scales_that_are_not_finite_give_nan(dtype: torch.dtype, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In all results of the heads that they are of, and nowhere else; also where what is merged into is finite."""
    lens = [300, 40]
    rows = make_case(lens, [100, 40], [0, 1], lens, "cuda")
    q, k, v = make_qkv(rows, sum(lens), (8, 4), (128, 128), dtype, "cuda", 3, padding=0)
    q[5:50] = 0
    v[::2] = 0
    stored, n = stored_keys(k, v, E4M3, "head"), rows.num_queries
    want, want_lse = attend(monkeypatch, q, stored, rows, options)
    # What is prepared once is launched again.
    given_options = options_of(options, q.device)
    for name in ("k_scale", "v_scale"):
        for head, bad in enumerate((torch.nan, torch.inf, -torch.inf)):
            scale = getattr(stored, name).clone()
            scale[head] = bad
            keys, heads = stored._replace(**{name: scale}), slice(2 * head, 2 * head + 2)
            fine = [other for other in range(8) if other // 2 != head]
            out, lse = ragged_attention(q, keys, rows, given_options)
            assert out[:n, heads].isnan().all()
            assert torch.equal(out[:n, fine], want[:n, fine])
            assert torch.equal(lse[:n, fine], want_lse[:n, fine])
            # A scale of V has no part in a sum of weights.
            assert lse[:n, heads].isnan().all() if name == "k_scale" else torch.equal(lse[:n], want_lse[:n])
            acc, acc_lse = torch.randn(len(q), 8, 128, device="cuda"), torch.randn(len(q), 8, device="cuda")
            ragged_attention(q, keys, rows, given_options, into=(acc, acc_lse))
            assert acc[:n, heads].isnan().all()
            assert acc[:n, fine].isfinite().all()


@on_hopper
def test_queries_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one key the value is the result, to the bit, however large the score; and nothing overflows between keys of large scores."""
    n = 64
    rows = make_case([1] * n, [1] * n, list(range(n)), [1] * n, "cuda")
    q, k, v = make_qkv(rows, n, (8, 2), (128, 128), BF16, "cuda", 4, padding=0)
    q *= (2.0 ** torch.linspace(-126, 110, n, device="cuda")).to(BF16)[:, None, None]
    keys = stored_keys(k, v, E4M3, "head")
    out, lse = attend(monkeypatch, q, keys, rows, {}, out_dtype=torch.float32)
    assert keys.v_scale is not None
    want = (keys.v.float() * keys.v_scale[:, None]).repeat_interleave(4, 1)
    assert torch.equal(out, want)
    k64 = meant_by(keys)[0].repeat_interleave(4, 1)
    scores = 0.2 * (q.double() * k64).sum(2)
    # fp32 sums of 128 products.
    assert ((lse - scores).abs() <= 128 * 2.0**-24 * 0.2 * (q.double() * k64).abs().sum(2) + 2.0**-21).all()


@on_hopper
def test_many_small_weights_beside_a_large_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """100,000 keys of 2 ** -25 of the largest weight each: in fp16 without more bits all of them would be 0."""
    many = 100_000
    rows = make_case([many], [1], [0], [many], "cuda")
    q = torch.zeros(1, 8, 128, dtype=BF16, device="cuda")
    q[:, :, 0] = 1
    k, v = (torch.zeros(many, 2, 128, device="cuda") for _ in range(2))
    # The scale of scores is 0.2.
    k[0, :, 0], v[1:] = 88.0, 448.0
    keys = Keys(k.to(E4M3), v.to(E4M3))
    out, lse = attend(monkeypatch, q, keys, rows, {}, out_dtype=torch.float32)
    check(q, *meant_by(keys), rows, options_of({}, q.device), out, lse, weights=FP16)
    assert float(out.min()) > 0


def test_it_compiles_for_hopper() -> None:
    """Keys are copied 16 bytes at a time, and products of fp8 are in fp16, wherever there is a compiler."""
    said_by_compiling("programs.compile_stored_keys")


@on_hopper
@pytest.mark.parametrize("scales", ["head", "token"])
def test_many_short_items_after_each_other(scales: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than there are programs: each draws several, of one block, of some, and of none."""
    lens = [(1, 0, 130, 64, 400, 0, 128, 257)[i % 8] for i in range(400)]
    q_len = [(1, 2, 1, 70, 1, 1, 150, 1)[i % 8] for i in range(400)]
    rows = make_case(lens, q_len, list(range(400)), lens, "cuda")
    q, k, v = make_qkv(rows, sum(lens), (8, 2), (128, 128), BF16, "cuda", 2)
    keys = stored_keys(k, v, E4M3, scales)
    want, want_lse = attend(monkeypatch, q, keys, rows, {})
    # All but the weights and the result is exact with scales of heads; with those of tokens keys and values are rounded as well.
    copy = torch.empty_like(k), torch.empty_like(v)
    triton_moves.dequantize(*copy, StoredRows(keys.k, keys.v, keys.k_scale, keys.v_scale))
    check(q, *(copy if scales == "token" else meant_by(keys)), rows, options_of({}, q.device), want, want_lse)
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
