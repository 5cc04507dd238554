"""The Triton attention kernel against float64, with everything that no query may see poisoned."""

from __future__ import annotations

import gc
import itertools
import weakref

import numpy as np
import pytest
import torch
from inputs.ragged_inputs import check, compiled_only, launch_attention, make_qkv, make_rows, random_rows

from cpattn.attention.backend import AttentionOptions
from cpattn.attention.merge import merge_
from cpattn.attention.ragged_rows import RaggedRows
from cpattn.attention.reference import reference_attention
from cpattn.attention.triton import BACKEND, triton_accumulate
from cpattn.kernels.tile_shapes import TileShape, padded_head_dim, tile_shapes
from cpattn.kernels.tiles import choose, cut, launch_for
from cpattn.keys import Keys

pytest.importorskip("triton")

# Small tiles, so that small inputs have interior and boundary blocks.
SHAPES = (TileShape(32, 16, 4, 2), TileShape(16, 16, 4, 2))
TMA = (TileShape(32, 16, 4, 2, tma=True), TileShape(16, 16, 4, 2, tma=True))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize("seed", [*range(14), *(pytest.param(seed, marks=compiled_only) for seed in range(14, 40))])
def test_random_rows(seed: int, device: str) -> None:
    rng = np.random.default_rng(seed)
    num_keys = 150
    rows = random_rows(rng, num_keys, device)
    heads = [(1, 1), (4, 4), (4, 2), (6, 2), (8, 1), (5, 1)][seed % 6]
    dims = [(64, 64), (16, 16), (96, 96), (24, 40), (64, 32), (32, 128)][seed // 2 % 6]
    dtype = DTYPES[seed % 3]
    options = AttentionOptions(
        scale=float(rng.choice([dims[0] ** -0.5, 0.3, -0.1, 0.0], p=[0.7, 0.1, 0.1, 0.1])),
        window=int(rng.choice([1, 5, 16, 17, 60, 1000])) if rng.random() < 0.5 else None,
        softcap=float(rng.choice([0.5, 30.0])) if rng.random() < 0.3 else None,
        sinks=torch.randn(heads[0], device=device) if rng.random() < 0.3 else None,
    )
    q, k, v = make_qkv(rows, num_keys, heads, dims, dtype, device, seed)
    out_dtype = dtype if rng.random() < 0.5 else torch.float32
    out, lse = launch_attention(
        q, k, v, rows, scale=options.scale, window=options.window, softcap=options.softcap, sinks=options.sinks,
        out_dtype=out_dtype, shapes=TMA if seed % 4 == 3 else SHAPES,
    )  # fmt: skip
    assert out.dtype == out_dtype
    assert lse.dtype == torch.float32
    assert out.shape == (*q.shape[:2], dims[1])
    assert lse.shape == q.shape[:2]
    assert lse.is_contiguous()
    check(q, k, v, rows, options, out, lse)


# In the interpreter these take seconds each.
INTERPRETED = {(64, 64): torch.float32, (128, 128): torch.bfloat16, (192, 128): torch.float32, (72, 8): torch.bfloat16}
DEFAULT_SHAPES = [
    pytest.param(
        dims,
        dtype,
        marks=[] if INTERPRETED.get(dims) == dtype else compiled_only,
        id=f"{dims}-{str(dtype).removeprefix('torch.')}",
    )
    for dims in [(64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256), (72, 8)]
    for dtype in DTYPES
]


@pytest.mark.parametrize(("dims", "dtype"), DEFAULT_SHAPES)
def test_default_shapes(dims: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    rows = make_rows([200, 1, 40], [0, 3, 100], [300, 200, 200], [101, 200, 20], device)
    q, k, v = make_qkv(rows, 300, (4, 2), dims, dtype, device, 0)
    options = AttentionOptions(scale=dims[0] ** -0.5)
    out, lse = BACKEND.run(q, k, v, rows, options, dtype)
    check(q, k, v, rows, options, out, lse)


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "tma"])
@pytest.mark.parametrize("window", [None, 21])
def test_every_row_alone_never_reads_outside_of_its_range(window: int | None, tma: bool, device: str) -> None:
    shapes = TMA if tma else SHAPES
    for k_start, k_len, diagonal in [(20, 50, 11), (20, 50, 60), (20, 50, -5), (20, 7, 1), (33, 32, 32)]:
        rows = make_rows([40], [k_start], [k_len], [diagonal], device)
        q, k, v = make_qkv(rows, 100, (2, 1), (32, 32), torch.bfloat16, device, 1)
        assert k[:k_start].isnan().all()
        assert v[k_start + k_len :].isnan().all()
        options = AttentionOptions(scale=0.2, window=window)
        out, lse = launch_attention(q, k, v, rows, scale=0.2, window=window, shapes=shapes)
        check(q, k, v, rows, options, out, lse)


def test_keys_that_no_query_of_a_tile_sees_may_be_nan(device: str) -> None:
    rows = make_rows([10], [0], [60], [21], device)
    q, k, v = make_qkv(rows, 60, (2, 1), (32, 32), torch.bfloat16, device, 2)
    clean, clean_lse = launch_attention(q, k, v, rows, scale=0.2, window=9, shapes=SHAPES)
    k[:12], v[:12], k[30:], v[30:] = (torch.nan,) * 4
    out, lse = launch_attention(q, k, v, rows, scale=0.2, window=9, shapes=SHAPES)
    assert torch.equal(out[:10], clean[:10])
    assert torch.equal(lse[:10], clean_lse[:10])


def test_no_queries_and_no_keys(device: str) -> None:
    options = AttentionOptions(scale=1.0)
    empty = make_rows([], [], [], [], device)
    q = torch.randn(4, 2, 16, device=device)
    none = torch.empty(0, 1, 16, device=device)
    out, lse = BACKEND.run(q, none, none, empty, options, q.dtype)
    assert out.shape == (4, 2, 16)
    assert lse.shape == (4, 2)
    rows = make_rows([0, 4], [0, 0], [0, 0], [1, 1], device)
    out, lse = BACKEND.run(q, none, none, rows, options, q.dtype)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    sinks = torch.tensor([1.5, -torch.inf], device=device)
    out, lse = BACKEND.run(q, none, none, rows, AttentionOptions(scale=1.0, sinks=sinks), q.dtype)
    assert (out == 0).all()
    assert torch.equal(lse, sinks.expand(4, 2))


def test_large_scores_do_not_overflow(device: str) -> None:
    rows = make_rows([33], [0], [64], [32], device)
    q, k, v = make_qkv(rows, 64, (1, 1), (16, 16), torch.float32, device, 3)
    options = AttentionOptions(scale=100.0)
    out, lse = launch_attention(q, k, v, rows, scale=100.0, shapes=SHAPES)
    want, want_lse = reference_attention(q.double().cpu(), Keys(k.double().cpu(), v.double().cpu()), rows, options, torch.float64)
    torch.testing.assert_close(lse[:33].cpu().double(), want_lse[:33], rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(out[:33].cpu().double(), want[:33], rtol=1e-3, atol=1e-3)


def test_softcap_is_exact_in_fp32(device: str) -> None:
    rows = make_rows([20], [0], [40], [21], device)
    q, k, v = make_qkv(rows, 40, (1, 1), (16, 16), torch.float32, device, 4)
    for softcap, scale in itertools.product([1e-2, 1.0, 50.0, 1e4], [0.01, 1.0]):
        options = AttentionOptions(scale=scale, softcap=softcap)
        out, lse = launch_attention(q, k, v, rows, scale=scale, softcap=softcap, shapes=SHAPES)
        check(q, k, v, rows, options, out, lse)


# ---- merging into an earlier result


@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(seed, marks=compiled_only) for seed in range(4, 8))])
def test_into_is_the_merge_of_two_results(seed: int, device: str) -> None:
    rng = np.random.default_rng(100 + seed)
    first = random_rows(rng, 100, device)
    n = len(first)
    k_len = np.where(rng.random(n) < 0.4, 0, rng.integers(1, 101, n))
    second = RaggedRows.build(first.host.q_len, rng.integers(0, 101 - k_len), k_len, rng.integers(-30, 130, n), device)
    q, k, v = make_qkv(first, 100, (4, 2), (32, 24), torch.bfloat16, device, seed)
    k2, v2 = make_qkv(second, 100, (4, 2), (32, 24), torch.bfloat16, device, seed + 1)[1:]
    window = 20 if seed % 2 else None
    acc, acc_lse = launch_attention(q, k, v, first, scale=0.2, window=window, out_dtype=torch.float32, shapes=SHAPES)
    out, lse = launch_attention(q, k2, v2, second, scale=0.2, window=window, out_dtype=torch.float32, shapes=SHAPES)
    covered = slice(0, first.num_queries)
    want, want_lse = acc.clone(), acc_lse.clone()
    merge_(want[covered], want_lse[covered], out[covered], lse[covered])
    acc[first.num_queries :] = 7.0
    before = acc.clone()
    got = launch_attention(q, k2, v2, second, scale=0.2, window=window, into=(acc, acc_lse), shapes=SHAPES)
    assert got[0] is acc
    assert got[1] is acc_lse
    torch.testing.assert_close(acc[covered], want[covered], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(acc_lse[covered], want_lse[covered], rtol=1e-5, atol=1e-6)
    unseen = (lse == -torch.inf)[covered]
    assert torch.equal(acc[covered][unseen], before[covered][unseen])
    assert (acc[first.num_queries :] == 7.0).all()


def test_accumulate_of_the_backend(device: str) -> None:
    rows = make_rows([5], [0], [30], [26], device)
    q, k, v = make_qkv(rows, 30, (2, 1), (16, 16), torch.float32, device, 0, padding=0)
    options = AttentionOptions(scale=0.25)
    whole, whole_lse = BACKEND.run(q, k, v, rows, options, torch.float32)
    acc, lse = torch.zeros_like(whole), torch.full_like(whole_lse, -torch.inf)
    for start, length, diagonal in [(0, 13, 26), (13, 17, 13)]:
        triton_accumulate(q, Keys(k, v), make_rows([5], [start], [length], [diagonal], device), options, acc, lse)
    torch.testing.assert_close(acc, whole)
    torch.testing.assert_close(lse, whole_lse)


# ---- the same bits wherever a query lies


@pytest.fixture
def same_product_in_every_row(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A BLAS product of a row may depend on where in the matrix it lies, which tensor cores' does not."""
    if device == "cpu":
        monkeypatch.setattr("triton.runtime.interpreter.np.matmul", lambda a, b, dtype: np.einsum("mk,kn->mn", a, b, dtype=dtype))


@pytest.mark.usefixtures("same_product_in_every_row")
@pytest.mark.parametrize(
    ("pack", "window"),
    [
        (False, None),
        pytest.param(False, 37, marks=compiled_only),
        pytest.param(True, None, marks=compiled_only),
        (True, 37),
    ],
    ids=["alone-None", "alone-37", "packed-None", "packed-37"],
)
def test_bits_do_not_depend_on_the_tile(pack: bool, window: int | None, device: str) -> None:
    """Each query has the same bits as a whole, in rows cut anywhere, and in another batch."""
    heads = (4, 1) if pack else (2, 2)
    shapes = (TileShape(32, 16, 4, 2),)
    tokens, keys = (75, 120) if device != "cpu" else (43, 70)
    whole = make_rows([tokens], [0], [keys], [keys - tokens + 1], device)
    q, k, v = make_qkv(whole, keys, heads, (32, 32), torch.bfloat16, device, 5, padding=0)
    out, lse = launch_attention(q, k, v, whole, scale=0.2, window=window, shapes=shapes)
    for cuts in ([1] * tokens, [30, tokens - 30], [7, 1, tokens - 15, 7]):
        ends = np.cumsum(cuts)
        begins = ends - cuts
        # Half of the rows know only the keys up to their own end: later keys must not matter either.
        lens = [keys - tokens + int(end) if i % 2 else keys for i, end in enumerate(ends)]
        rows = make_rows(cuts, [0] * len(cuts), lens, [keys - tokens + 1 + int(b) for b in begins], device)
        again, again_lse = launch_attention(q, k, v, rows, scale=0.2, window=window, shapes=shapes)
        assert torch.equal(again, out), f"rows of {cuts}"
        assert torch.equal(again_lse, lse), f"rows of {cuts}"


@pytest.mark.usefixtures("same_product_in_every_row")
@pytest.mark.parametrize(
    ("dim", "specialized"),
    [
        (64, False),
        pytest.param(64, True, marks=compiled_only),
        pytest.param(128, False, marks=compiled_only),
        (128, True),
        pytest.param(256, False, marks=compiled_only),
        pytest.param(256, True, marks=compiled_only),
    ],
    ids=["64-plain", "64-specialized", "128-plain", "128-specialized", "256-plain", "256-specialized"],
)
def test_bits_do_not_depend_on_the_shape(dim: int, specialized: bool, device: str) -> None:
    """Every shape that the choice may fall on gives the same bits, packed or not."""
    capability = (9, 0) if device == "cpu" else torch.cuda.get_device_capability()
    rows = make_rows([130, 1], [0, 5], [300, 290], [171, 290], device)
    for heads in [(2, 2), (4, 1)]:
        q, k, v = make_qkv(rows, 300, heads, (dim, dim), torch.bfloat16, device, 6, padding=0)
        results = [
            launch_attention(q, k, v, rows, scale=dim**-0.5, shapes=(shape._replace(tma=tma),))
            for shape in tile_shapes(dim, dim, torch.bfloat16, capability, specialized)
            for tma in (False, shape.tma)
        ]
        for out, lse in results[1:]:
            assert torch.equal(out, results[0][0])
            assert torch.equal(lse, results[0][1])


@pytest.mark.parametrize("seed", range(16))
def test_specialized_kernel_is_the_plain_one(seed: int, device: str) -> None:
    """To the bit, with every option, and right."""
    if device == "cpu" or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    rng = np.random.default_rng(seed)
    num_keys = 700
    rows = random_rows(rng, num_keys, device)
    heads = [(1, 1), (4, 2), (6, 2), (8, 1)][seed % 4]
    dims = [(128, 128), (64, 64), (72, 96), (128, 64), (192, 128), (256, 256)][seed % 6]
    dtype = DTYPES[seed % 2]
    options = AttentionOptions(
        scale=float(rng.choice([dims[0] ** -0.5, -0.1])),
        window=int(rng.choice([1, 60, 200])) if rng.random() < 0.5 else None,
        softcap=30.0 if rng.random() < 0.3 else None,
        sinks=torch.randn(heads[0], device=device) if rng.random() < 0.3 else None,
    )
    q, k, v = make_qkv(rows, num_keys, heads, dims, dtype, device, seed)
    n = rows.num_queries
    results = []
    for shape in tile_shapes(*dims, dtype, (9, 0), specialized=True):
        assert shape.specialized
        for specialized, pack in itertools.product([True, False], {1, heads[0] // heads[1]}):
            out, lse = launch_attention(
                q, k, v, rows, scale=options.scale, window=options.window, softcap=options.softcap, sinks=options.sinks,
                out_dtype=torch.float32, shapes=(shape._replace(specialized=specialized),), packs=(pack,),
            )  # fmt: skip
            results.append((out[:n], lse[:n]))
    check(q, k, v, rows, options, *results[0])
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


# ---- the host side


def test_tiles_cover_every_query_once_and_come_about_longest_first() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        rows = random_rows(rng, 300, "cpu")
        window = int(rng.integers(1, 100)) if rng.random() < 0.5 else None
        tiles, blocks = cut(rows.host, 8, 16, window)
        covered = [t for begin, count in zip(tiles.q_begin, tiles.q_count, strict=True) for t in range(begin, begin + count)]
        assert sorted(covered) == list(range(rows.num_queries))
        assert (blocks - np.minimum.accumulate(blocks) <= blocks.max(initial=0) / 16).all()
        assert (tiles.q_count <= 8).all()


@pytest.mark.parametrize("specialized", [False, True], ids=["plain", "specialized"])
def test_choice_packs_short_ranges_only(specialized: bool) -> None:
    shapes = tile_shapes(128, 128, torch.bfloat16, (9, 0), specialized)
    decode = make_rows([1] * 64, list(range(0, 64 * 1000, 1000)), [1000] * 64, [1000] * 64, "cpu")
    shape, pack, *_ = choose(decode.host, shapes, (1, 4), 32, None, 132)
    assert pack == 4
    # A specialized tile of 128 rows with work for one warpgroup is one of 64.
    assert specialized or shape.block_m == 64
    long = make_rows([8192, 8192], [0, 0], [8192, 65536], [1, 57345], "cpu")
    shape, pack, *_ = choose(long.host, shapes, (1, 4), 32, None, 132)
    assert pack == 1
    assert shape.block_m == 128


def test_launches_live_as_long_as_their_rows() -> None:
    rows = make_rows([100], [0], [100], [1], "cpu")
    shapes = tile_shapes(128, 128, torch.bfloat16, (9, 0))
    launch = launch_for(rows, shapes, (1, 4), 32, None, 132)
    assert launch_for(rows, shapes, (1, 4), 32, None, 132) is launch
    assert launch_for(rows, shapes, (1, 4), 32, 50, 132) is not launch
    table = weakref.ref(launch)
    del rows, launch
    gc.collect()
    assert table() is None


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 0), (12, 0)], ids=str)
def test_block_n_does_not_depend_on_the_choice(capability: tuple[int, int]) -> None:
    for dim, dtype, specialized in itertools.product([16, 64, 96, 128, 192, 256], DTYPES, [False, True]):
        shapes = tile_shapes(dim, dim, dtype, capability, specialized)
        assert len({shape.block_n for shape in shapes}) == 1
        assert [shape.block_m for shape in shapes] == sorted((shape.block_m for shape in shapes), reverse=True)


def test_padded_head_dim() -> None:
    assert [padded_head_dim(d) for d in (1, 16, 17, 64, 96, 128, 192, 256)] == [16, 16, 32, 64, 128, 128, 256, 256]
