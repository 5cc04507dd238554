"""shard along any axis, of every dtype that moves rows, with gradients and with an engine's padding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import cpattn
from cpattn.testing import run_loopback

PLAN = cpattn.plan([(0, 7), (3, 0), (9, 4)], 3, pad_to=8)
TOKENS = 11
DTYPES = [
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8, torch.bool),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.complex32, torch.complex64, torch.complex128),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
]


def some(dtype: torch.dtype, *shape: int) -> Tensor:
    """Any bits, but for bool, which has two values."""
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, dtype=torch.uint8).bool()
    return torch.randint(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), dtype=torch.uint8).view(dtype)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("shape", [(), (3,), (2, 5)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_keeps_its_bits(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = some(dtype, TOKENS, *shape)
    rows = []
    for rank in range(3):
        meta = PLAN.metadata(rank)
        local = cpattn.shard(x, meta)
        assert local.dtype == dtype
        tokens = meta.token_index[: meta.num_tokens].tolist()
        assert torch.equal(bits(local[: meta.num_tokens]), torch.stack([bits(x[token : token + 1]) for token in tokens]).flatten(0, 1))
        assert not bits(local[meta.num_tokens :]).any()
        rows.append(local)
    together = run_loopback(lambda group: cpattn.unshard(rows[group.rank], PLAN.metadata(group.rank), group=group), 3)
    assert all(torch.equal(bits(one), bits(x)) for one in together)


@pytest.mark.parametrize("bucket", [None, cpattn.Bucket(max_requests=4, max_rows=10, max_chunks=8)], ids=["", "bucket"])
@pytest.mark.parametrize(
    ("shape", "dim"), [((3, 11), 1), ((1, 11, 8), 1), ((1, 11, 8), -2), ((2, 5, 11), 2), ((2, 5, 11), -1), ((11, 4), 0)]
)
def test_rows_lie_along_any_axis(shape: tuple[int, ...], dim: int, bucket: cpattn.Bucket | None) -> None:
    x = torch.randn(shape)
    for rank in range(3):
        meta = PLAN.metadata(rank, bucket=bucket)
        local = cpattn.shard(x, meta, dim=dim)
        assert local.is_contiguous()
        assert torch.equal(local.movedim(dim, 0), cpattn.shard(x.movedim(dim, 0).contiguous(), meta))


def test_gradients_flow_along_any_axis() -> None:
    x = torch.randn(3, TOKENS, requires_grad=True)
    for rank in range(3):
        cpattn.shard(x, PLAN.metadata(rank), dim=1).sum().backward()  # type: ignore[no-untyped-call]
    # Every token is on one rank.
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones(3, TOKENS))


@pytest.mark.parametrize("dim", [0, 1])
def test_padding_after_the_last_token_is_ignored(dim: int) -> None:
    whole = torch.randn(2, 24)
    meta = PLAN.metadata(1)
    x = whole if dim else whole.t().contiguous()
    tokens = x.narrow(dim, 0, TOKENS)
    assert torch.equal(cpattn.shard(x, meta, dim=dim), cpattn.shard(tokens, meta, dim=dim))


def test_lazy_conjugates_are_what_they_show() -> None:
    x = torch.randn(TOKENS, 2, dtype=torch.complex64).conj()
    meta = PLAN.metadata(0)
    assert not cpattn.shard(x, meta).is_conj()
    assert torch.equal(cpattn.shard(x, meta), cpattn.shard(x.resolve_conj(), meta))
    rows = [cpattn.shard(x, PLAN.metadata(rank)).conj() for rank in range(3)]
    for together in run_loopback(lambda group: cpattn.unshard(rows[group.rank], PLAN.metadata(group.rank), group=group), 3):
        assert torch.equal(together, x.conj())
