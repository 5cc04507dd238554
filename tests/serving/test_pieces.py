"""gather_kv, slot_mapping, write_kv and attend: one after another they are cp_attention, and each stands on its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from inputs.cases import AttentionCase
from inputs.strategies import Batch, any_plan_options, batches
from torch import Tensor

import cpattn
from cpattn.testing import SoloCommunicator, run_loopback

MIXED = [(0, 21), (37, 18), (30, 0), (47, 1), (0, 0), (16, 5)]
BUCKET = cpattn.Bucket(max_requests=8, max_rows=64, max_chunks=16)


@pytest.mark.parametrize("slot_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("bucket", [None, BUCKET], ids=["", "bucket"])
@pytest.mark.parametrize("v_in_k", [False, True], ids=["k and v", "v in k"])
@pytest.mark.parametrize("cp_size", [1, 3])
def test_the_pieces_are_cp_attention(cp_size: int, v_in_k: bool, bucket: cpattn.Bucket | None, slot_dtype: torch.dtype) -> None:
    case = AttentionCase(MIXED, cache="paged", page_size=3, v_in_k=v_in_k, sinks=True, dtype=torch.bfloat16)
    plan = case.plan(cp_size, pad_to=4)
    max_requests = bucket and bucket.max_requests

    def program(communicator: cpattn.Communicator) -> int:
        meta = plan.metadata(communicator.rank, bucket=bucket)
        q, k, v = (cpattn.shard(x, meta) for x in (case.q, case.k, case.v))
        for x in (q, k, v):
            x[meta.num_tokens :] = torch.nan
        new_v, v_dim = (None, v.shape[2]) if v_in_k else (v, None)
        whole, pieces = (case.pages(plan, communicator.rank, max_requests=max_requests) for _ in range(2))
        options: dict[str, Any] = {"v_dim": v_dim, "backend": "reference", "return_lse": True, "sinks": case.options["sinks"]}
        expected = cpattn.cp_attention(q, k, new_v, meta, group=communicator, kv_cache=whole.cache, strategy="all_gather", **options)
        sent = communicator.bytes_sent

        gathered_k, gathered_v = cpattn.gather_kv(k, new_v, meta, group=communicator)
        assert communicator.bytes_sent == 2 * sent
        slots = cpattn.slot_mapping(meta, pieces.cache.page_table, pieces.page_size)
        cpattn.write_kv(gathered_k, gathered_v, pieces.cache, slots.to(slot_dtype))
        pieces.check_written()
        out, lse = cpattn.attend(q, pieces.cache, meta, **options)
        assert torch.equal(out, expected[0])
        assert torch.equal(lse, expected[1])
        assert communicator.bytes_sent == 2 * sent
        return sent

    width = case.k.shape[2] + (0 if v_in_k else case.v.shape[2])
    rows = plan.rows if bucket is None else bucket.max_rows
    assert set(run_loopback(program, cp_size)) == {(cp_size - 1) * rows * case.k.shape[1] * width * 2}


@given(batch=batches(max_requests=6, max_prefix=40, max_extend=40), options=any_plan_options())
@settings(max_examples=100, deadline=None)
def test_slots_are_in_the_order_of_the_gathered_buffer(batch: Batch, options: dict[str, Any]) -> None:
    plan = cpattn.plan(batch, **options)
    page_size = 1 + len(batch) % 5
    width = -(-max(map(sum, batch), default=0) // page_size) + 1
    table = torch.randperm(len(batch) * width).view(len(batch), width)
    expected = [-1] * (plan.cp_size * plan.rows)
    taken = [0] * plan.cp_size
    for chunk in plan.chunks:
        for token in range(chunk.start, chunk.start + chunk.length):
            position = plan.batch[chunk.request].prefix_len + token
            slot = int(table[chunk.request, position // page_size]) * page_size + position % page_size
            expected[chunk.rank * plan.rows + taken[chunk.rank]] = slot
            taken[chunk.rank] += 1
    for cp_rank in range(plan.cp_size):
        slots = cpattn.slot_mapping(plan.metadata(cp_rank), table.int(), page_size)
        assert slots.dtype == torch.int64
        assert slots.tolist() == expected


@pytest.mark.parametrize("bucket", [None, BUCKET], ids=["", "bucket"])
def test_gathered_rows_are_zeros_on_padding_and_found_by_restore_index(bucket: cpattn.Bucket | None) -> None:
    case = AttentionCase(MIXED)
    plan = cpattn.plan(case.batch, 3, pad_to=8)

    def program(communicator: cpattn.Communicator) -> None:
        meta = plan.metadata(communicator.rank, bucket=bucket)
        restore_index = meta.restore_index[: plan.num_tokens].long()
        k, v = (cpattn.shard(x, meta) for x in (case.k, case.v))
        k[meta.num_tokens :] = v[meta.num_tokens :] = torch.nan
        for gathered, whole in zip(cpattn.gather_kv(k, v, meta, group=communicator), (case.k, case.v), strict=True):
            assert gathered is not None
            assert torch.equal(gathered[restore_index], whole)
            is_padding = torch.ones(len(gathered), dtype=torch.bool).index_fill(0, restore_index, False)
            assert is_padding.sum() == 3 * meta.rows - plan.num_tokens
            assert not gathered[is_padding].any()

    run_loopback(program, 3)


def test_nothing_new_sends_nothing() -> None:
    meta = cpattn.build_metadata([(5, 0)], 2, 0)
    communicator = SoloCommunicator(0, 2)
    k = torch.zeros(0, 2, 8)
    gathered, _ = cpattn.gather_kv(k, k, meta, group=communicator)
    assert gathered.shape == (0, 2, 8)
    pages = torch.zeros(3, 4, 2, 8)
    table = torch.tensor([[0, 2]], dtype=torch.int32)
    slots = cpattn.slot_mapping(meta, table, 4)
    assert slots.shape == (0,)
    cache = cpattn.PagedKV(pages, pages.clone(), table)
    cpattn.write_kv(gathered, gathered, cache, slots)
    assert cpattn.attend(torch.zeros(0, 4, 8), cache, meta).shape == (0, 4, 8)
    assert communicator.bytes_sent == 0


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_rows_of_a_negative_slot_are_skipped_whatever_they_hold(dtype: torch.dtype) -> None:
    cache = cpattn.PagedKV(torch.zeros(5, 2, 1, 4), torch.zeros(5, 2, 1, 4), torch.zeros(1, 1, dtype=torch.int32))
    k = torch.full((5, 1, 4), torch.nan)
    k[[1, 3]] = torch.tensor([1.0, 3.0])[:, None, None]
    cpattn.write_kv(k, 2 * k, cache, torch.tensor([-1, 9, -(2**31), 0, -7], dtype=dtype))
    assert cache.k_pages[..., 0, 0].flatten().tolist() == [3.0, *[0.0] * 8, 1.0]
    assert cache.v_pages is not None
    assert cache.v_pages[..., 0, 3].flatten().tolist() == [6.0, *[0.0] * 8, 2.0]


SLOTS = torch.tensor([0, 1, -1])
WRITE_MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no v": ({"v": None}, "of v and kv_cache.v_pages one is None and the other is not"),
    "heads": ({"k": torch.zeros(3, 2, 4)}, r"k is \(3, 2, 4\) torch.float32 on cpu, the pages are \(5, 2, 1, 4\)"),
    "dtype": ({"v": torch.zeros(3, 1, 4).half()}, r"k is torch.float32, v is torch.float16; both must be of one dtype"),
    "rows": ({"slots": SLOTS[:2]}, "k has 3 rows, but there are 2 slots; pass a slot for each row, -1 to skip it"),
    "slots of float": ({"slots": SLOTS.float()}, r"slots is \(3,\) torch.float32 on cpu; pass int32 or int64 \[rows\] on cpu"),
    "slots of two axes": ({"slots": SLOTS[:, None]}, r"slots is \(3, 1\) torch.int64 on cpu; pass"),
    "slots elsewhere": ({"slots": SLOTS.to("meta")}, r"slots is \(3,\) torch.int64 on meta; pass int32 or int64 \[rows\] on cpu"),
}


@pytest.mark.parametrize(("changes", "message"), WRITE_MISTAKES.values(), ids=WRITE_MISTAKES)
def test_write_kv_refuses_what_does_not_go_together(changes: dict[str, Any], message: str) -> None:
    cache = cpattn.PagedKV(torch.zeros(5, 2, 1, 4), torch.zeros(5, 2, 1, 4), torch.zeros(1, 1, dtype=torch.int32))
    arguments = {"k": torch.ones(3, 1, 4), "v": torch.ones(3, 1, 4), "slots": SLOTS} | changes
    with pytest.raises(cpattn.TensorMismatchError, match=message):
        cpattn.write_kv(kv_cache=cache, **arguments)
    assert not cache.k_pages.any()


def with_pages(**pages: Any) -> cpattn.PagedKV:
    return cpattn.PagedKV(
        **{"k_pages": torch.zeros(5, 2, 1, 4), "v_pages": torch.zeros(5, 2, 1, 4), "page_table": torch.zeros(1, 1)} | pages
    )


POOL = torch.zeros(6, 2, 1, 4)
MISTAKEN_WRITES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a slot twice": (
        {"slots": torch.tensor([4, 0, 4])},
        cpattn.PageTableError,
        r"slots\[0\] and slots\[2\] are both 4, and a slot holds one token only; give each row a slot of its own, or -1 to skip it",
    ),
    "a slot beyond the pages": (
        {"slots": torch.tensor([4, -1, 10], dtype=torch.int32)},
        cpattn.PageTableError,
        r"slots\[2\] is 10, but 5 pages of 2 tokens have slots 0 to 9; pass page \* page_size \+ place in the page, or -1",
    ),
    "K is V": ({"kv_cache": with_pages(k_pages=POOL, v_pages=POOL)}, cpattn.PageTableError, "k_pages and v_pages have elements in common"),
    "K meets V": (
        {"kv_cache": with_pages(k_pages=POOL[1:], v_pages=POOL[:-1])},
        cpattn.PageTableError,
        "k_pages and v_pages have elements in common",
    ),
    "expanded pages": (
        {"kv_cache": with_pages(v_pages=POOL[:1].expand(5, -1, -1, -1))},
        cpattn.PageTableError,
        r"kv_cache.v_pages has shape \(5, 2, 1, 4\) and strides \(0, 4, 4, 1\), so that several tokens lie in the same memory",
    ),
    "pages are a list": ({"kv_cache": with_pages(k_pages=[POOL])}, cpattn.PageTableError, "kv_cache.k_pages is a list; pass a tensor"),
    "pages of three axes": (
        {"kv_cache": with_pages(v_pages=POOL[0])},
        cpattn.PageTableError,
        r"v_pages has shape \(2, 1, 4\); pass a tensor",
    ),
    "other page size": (
        {"kv_cache": with_pages(v_pages=POOL[:5, :1])},
        cpattn.PageTableError,
        r"\(5, 2\) pages of tokens, v_pages \(5, 1\)",
    ),
    "no cache": ({"kv_cache": (POOL, POOL)}, cpattn.PrefixError, "kv_cache is a tuple; pass a PagedKV"),
    "k is a list": ({"k": [1.0]}, cpattn.TensorMismatchError, r"k is a list; pass a tensor \[rows, heads, head_dim\]"),
    "slots are a list": ({"slots": [4, -1, 0]}, cpattn.TensorMismatchError, r"slots is a list; pass an int32 or int64 tensor \[rows\]"),
    "gradient": ({"k": torch.ones(3, 1, 4, requires_grad=True)}, cpattn.UnsupportedError, "k requires a gradient"),
}


@pytest.mark.parametrize(("changes", "kind", "message"), MISTAKEN_WRITES.values(), ids=MISTAKEN_WRITES)
@pytest.mark.parametrize("check", [False, True], ids=["", "check"])
def test_write_kv_refuses_what_would_be_lost_before_anything_is_written(
    changes: dict[str, Any], kind: type[Exception], message: str, check: bool
) -> None:
    arguments: dict[str, Any] = {"k": torch.ones(3, 1, 4), "v": torch.ones(3, 1, 4), "slots": SLOTS, "kv_cache": with_pages()} | changes
    with pytest.raises(kind, match=message):
        cpattn.write_kv(**arguments, check=check)
    assert not POOL.any()
    cache = arguments["kv_cache"]
    if isinstance(cache, cpattn.PagedKV) and isinstance(cache.k_pages, Tensor):
        assert not cache.k_pages.any()


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_write_kv_writes_views_of_one_memory_that_are_apart(dim: int) -> None:
    k_pages, v_pages = torch.zeros(5, 2, 1, 4).unsqueeze(dim).repeat_interleave(2, dim).unbind(dim)
    cpattn.write_kv(torch.ones(3, 1, 4), torch.full((3, 1, 4), 2.0), with_pages(k_pages=k_pages, v_pages=v_pages), SLOTS)
    assert (int(k_pages.sum()), int(v_pages.sum())) == (8, 16)


@pytest.mark.parametrize("check", [False, True], ids=["", "check"])
def test_what_slot_mapping_refuses_of_a_table(check: bool) -> None:
    meta = cpattn.build_metadata([(5, 3), (4, 2)], 2, 0)
    table = torch.tensor([[7, 3], [1, 4]])

    def slots(request: int = 0, page: int = 0, number: int = 7, page_size: Any = 4) -> Tensor:
        changed = table.clone()
        changed[request, page] = number
        return cpattn.slot_mapping(meta, changed, page_size, check=check)

    assert sorted(slots().tolist()) == [-1, 13, 14, 15, 16, 17]
    with pytest.raises(
        cpattn.PageTableError, match=r"page_table\[0, 1\] is -2, but pages are numbered from 0; request 0 needs 2 pages of 4"
    ):
        slots(0, 1, -2)
    for number, token in ((7, 0), (3, 4)):
        message = f"puts new token 4 of request 1 and cached token {token} of request 0 into the same slot, place 0 of page {number}"
        with pytest.raises(cpattn.PageTableError, match=message):
            slots(1, 1, number)
    # Pages that are only read are not needed here, and may be shared.
    for number in (-1, 1):
        assert torch.equal(slots(0, 0, number), slots())
    assert int(slots(0, 1, 2**40).max()) == 2**42 + 3
    for page_size in (0, -4, True, 4.0, "4", None):
        message = f"page_size={page_size!r}; pass the number of tokens of a page, an integer of at least 1"
        with pytest.raises(cpattn.PageTableError, match=message):
            slots(page_size=page_size)


def test_attend_reads_pages_that_are_shared_or_both_k_and_v() -> None:
    meta = cpattn.build_metadata([(5, 3), (4, 2)], 1, 0)
    pages, q = torch.randn(9, 4, 2, 8), torch.randn(5, 4, 8)
    table = torch.tensor([[7, 3], [7, 3]])
    out = cpattn.attend(q, cpattn.PagedKV(pages, pages, table), meta, check=True)
    expected = cpattn.attend(q, cpattn.PagedKV(pages, pages.clone(), table), meta)
    assert torch.equal(out, expected)
    one = pages[:1].expand(9, -1, -1, -1)
    assert torch.equal(
        cpattn.attend(q, cpattn.PagedKV(one, one, table), meta),
        cpattn.attend(q, cpattn.PagedKV(pages, pages, torch.zeros_like(table)), meta),
    )
    for check in (False, True):
        with pytest.raises(cpattn.PageTableError, match=r"page_table\[0, 0\] is 9, but there are pages 0 to 8; request 0 needs 2 pages"):
            cpattn.attend(q, cpattn.PagedKV(pages, pages, table + 2), meta, check=check)


def pieces_of(meta: cpattn.CPMetadata) -> tuple[Tensor, Tensor, cpattn.PagedKV]:
    pages = torch.zeros(9, 4, 2, 8)
    return torch.zeros(meta.rows, 4, 8), torch.zeros(meta.rows, 2, 8), cpattn.PagedKV(pages, pages.clone(), torch.tensor([[0, 1]]))


def test_what_the_pieces_refuse() -> None:
    meta = cpattn.build_metadata([(3, 5)], 2, 1)
    q, k, cache = pieces_of(meta)
    group = SoloCommunicator(1, 2)
    with pytest.raises(cpattn.GroupError, match="this process is rank 0 of the group, but the metadata is that of cp_rank 1"):
        cpattn.gather_kv(k, k, meta, group=SoloCommunicator(0, 2))
    with pytest.raises(cpattn.RowCountError, match=r"k has \d rows, but this rank's metadata has"):
        cpattn.gather_kv(k[1:], k, meta, group=group)
    with pytest.raises(cpattn.TensorMismatchError, match=r"k has shape \(\d, 16\); pass a tensor \[rows, heads, head_dim\]"):
        cpattn.gather_kv(k.flatten(1), k, meta, group=group)
    with pytest.raises(cpattn.HeadCountError, match="k has 2 heads, v has 1"):
        cpattn.gather_kv(k, k[:, :1], meta, group=group)
    with pytest.raises(cpattn.PageTableError, match="page_table has 1 pages of 4 tokens for each request, 4 in all, but request 0 has 8"):
        cpattn.slot_mapping(meta, cache.page_table[:, :1], 4)
    with pytest.raises(cpattn.PrefixError, match=r"kv_cache is a PackedKV; pass a PagedKV\(k_pages, v_pages, page_table\)"):
        cpattn.attend(q, cpattn.PackedKV(k, k), meta)  # type: ignore[call-overload]
    with pytest.raises(cpattn.TensorMismatchError, match="q has head_dim 4, k has 8"):
        cpattn.attend(q[..., :4], cache, meta)
    with pytest.raises(cpattn.TensorMismatchError, match=r"q has shape \(\d, 32\); pass a tensor \[rows, heads, head_dim\]"):
        cpattn.attend(q.flatten(1), cache, meta)
    sharded = cpattn.build_metadata([(3, 5)], 2, 1, prefix_shards=[[1, 2]])
    with pytest.raises(cpattn.GroupError, match="the plan has 2 ranks, but there is no process group"):
        cpattn.attend(q, cache, sharded)
    assert group.bytes_sent == 0
