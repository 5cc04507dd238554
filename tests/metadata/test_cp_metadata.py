"""One rank's tensors against their definition in plain loops; and rows on their way to the ranks and back."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs.strategies import Batch, any_plan_options, batches, named_batches
from torch import Tensor

import cpattn
from cpattn import CPError, CPMetadata, Plan, RowCountError, device_tables
from cpattn.device_tables import DeviceTables, expand_runs_on_device, expand_runs_on_host
from cpattn.metadata import cp_metadata

CHUNK_TENSORS = ("chunk_request", "cu_seqlens_q", "k_len", "k_start")
TOKEN_TENSORS = ("token_index", "position_ids", "restore_index", "extend_key_rows", "prefix_key_rows")


def tokens_of(plan: Plan, cp_rank: int) -> list[tuple[int, int]]:
    """(request, token of its extend) of each of the rank's rows, in local order."""
    return [(c.request, c.start + i) for c in plan.chunks if c.rank == cp_rank for i in range(c.length)]


def by_definition(plan: Plan, cp_rank: int) -> dict[str, Any]:
    """What each attribute of the metadata means, from the plan's chunks alone (they have tests of their own)."""
    chunks = [chunk for chunk in plan.chunks if chunk.rank == cp_rank]
    k_lens = [plan.batch[c.request].prefix_len + c.start + c.length for c in chunks]
    mine = tokens_of(plan, cp_rank)
    padding = plan.rows - len(mine)
    all_tokens = [(i, token) for i, request in enumerate(plan.batch) for token in range(request.extend_len)]
    gathered = {token: rank * plan.rows + row for rank in range(plan.cp_size) for row, token in enumerate(tokens_of(plan, rank))}
    is_prefix = [position < prefix_len for prefix_len, extend_len in plan.batch for position in range(prefix_len + extend_len)]
    return {
        "cp_rank": cp_rank,
        "rows": plan.rows,
        "num_tokens": len(mine),
        "chunk_request": [c.request for c in chunks],
        "cu_seqlens_q": [sum(c.length for c in chunks[:n]) for n in range(len(chunks) + 1)],
        "k_len": k_lens,
        "k_start": [sum(map(sum, plan.batch[: c.request])) for c in chunks],
        "max_seqlen_q": max((c.length for c in chunks), default=0),
        "max_seqlen_k": max(k_lens, default=0),
        "token_index": [all_tokens.index(token) for token in mine] + [-1] * padding,
        "position_ids": [plan.batch[i].prefix_len + token for i, token in mine] + [0] * padding,
        "restore_index": [gathered[token] for token in all_tokens],
        "extend_key_rows": [row for row, cached in enumerate(is_prefix) if not cached],
        "prefix_key_rows": [row for row, cached in enumerate(is_prefix) if cached],
    }


def assert_as_defined(meta: CPMetadata) -> None:
    for name, expected in by_definition(meta.plan, meta.cp_rank).items():
        value = getattr(meta, name)
        if isinstance(value, Tensor):
            assert value.dtype == (torch.int64 if name == "position_ids" else torch.int32), name
            assert value.ndim == 1, name
            assert value.device == meta.device, name
            value = value.tolist()
        else:
            assert type(value) is int, name
        assert value == expected, name


class TestAgainstTheDefinition:
    @given(batches(max_requests=6, max_prefix=40, max_extend=40), any_plan_options())
    @settings(max_examples=300, deadline=None)
    def test_any_batch(self, batch: Batch, options: dict[str, Any]) -> None:
        plan = cpattn.plan(batch, **options)
        for cp_rank in range(plan.cp_size):
            assert_as_defined(plan.metadata(cp_rank))

    @pytest.mark.parametrize(
        "batch",
        named_batches(
            [
                "no requests",
                "nothing new",
                "one token",
                "one token after a prefix",
                "one token between empty requests",
                "shorter than the number of chunks",
                "decode",
                "prefill beside decode",
                "64 requests of 1",
                "primes",
            ]
        ),
    )
    @pytest.mark.parametrize("cp_size", [1, 2, 3, 8])
    def test_named_batch(self, batch: Batch, cp_size: int) -> None:
        plan = cpattn.plan(batch, cp_size, pad_to=4)
        for cp_rank in range(cp_size):
            assert_as_defined(plan.metadata(cp_rank))

    @given(batches(max_requests=4), any_plan_options(), st.data())
    def test_build_metadata_is_both_in_one_call(self, batch: Batch, options: dict[str, Any], data: st.DataObject) -> None:
        cp_rank = data.draw(st.integers(0, options["cp_size"] - 1))
        meta = cpattn.build_metadata(batch, cp_rank=cp_rank, **options)
        assert meta.plan == cpattn.plan(batch, **options)
        assert_as_defined(meta)

    def test_a_plan_in_numbers(self) -> None:
        """Request 0 in chunks of 2, 2, 2, 2 and request 1 in chunks of 1, 1, 1, 0; rank 1 owns the inner two of each."""
        meta = cpattn.build_metadata([(0, 8), (10, 3)], cp_size=2, cp_rank=1, pad_to=4)
        assert meta.plan.rank_tokens == (6, 5)
        assert (meta.rows, meta.num_tokens, meta.max_seqlen_q, meta.max_seqlen_k) == (8, 5, 2, 12)
        assert meta.chunk_request.tolist() == [0, 0, 1]
        assert meta.cu_seqlens_q.tolist() == [0, 2, 4, 5]
        assert meta.k_len.tolist() == [4, 6, 12]
        assert meta.k_start.tolist() == [0, 0, 8]
        assert meta.token_index.tolist() == [2, 3, 4, 5, 9, -1, -1, -1]
        assert meta.position_ids.tolist() == [2, 3, 4, 5, 11, 0, 0, 0]
        assert meta.restore_index.tolist() == [0, 1, 8, 9, 10, 11, 2, 3, 4, 12, 5]
        assert meta.extend_key_rows.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 18, 19, 20]
        assert meta.prefix_key_rows.tolist() == list(range(8, 18))

    def test_max_seqlen_is_a_length_and_not_a_total(self) -> None:
        meta = cpattn.build_metadata([(5, 8)] * 10, cp_size=2, cp_rank=0)
        assert (meta.max_seqlen_q, meta.max_seqlen_k) == (2, 13)
        assert meta.cu_seqlens_q.max() == 40

    @pytest.mark.parametrize("cp_rank", [0, 1, 2, 3])
    def test_a_decode_batch_leaves_ranks_without_a_token(self, cp_rank: int) -> None:
        meta = cpattn.build_metadata([(1000, 1), (7, 0)], cp_size=4, cp_rank=cp_rank)
        assert meta.rows == 1
        assert (meta.num_tokens, meta.max_seqlen_q, meta.max_seqlen_k) == ((1, 1, 1001) if cp_rank == 0 else (0, 0, 0))
        assert meta.token_index.tolist() == ([0] if cp_rank == 0 else [-1])
        assert meta.position_ids.tolist() == ([1000] if cp_rank == 0 else [0])
        assert meta.cu_seqlens_q.tolist() == ([0, 1] if cp_rank == 0 else [0])

    @given(batches(), any_plan_options())
    @settings(deadline=None)
    def test_prefix_lengths_do_not_depend_on_padding(self, batch: Batch, options: dict[str, Any]) -> None:
        plans = [cpattn.plan(batch, **options | {"pad_to": pad_to}) for pad_to in (1, 8, 64)]
        for cp_rank in range(options["cp_size"]):
            metas = [plan.metadata(cp_rank) for plan in plans]
            for meta in metas:
                assert (meta.num_tokens, meta.max_seqlen_q, meta.max_seqlen_k) == (
                    metas[0].num_tokens,
                    metas[0].max_seqlen_q,
                    metas[0].max_seqlen_k,
                )
                for name in CHUNK_TENSORS:
                    assert torch.equal(getattr(meta, name), getattr(metas[0], name)), name
                for name, fill in (("token_index", -1), ("position_ids", 0)):
                    tokens, padding = getattr(meta, name).split([meta.num_tokens, meta.rows - meta.num_tokens])
                    assert torch.equal(tokens, getattr(metas[0], name)[: meta.num_tokens]), name
                    assert (padding == fill).all(), name

    @given(batches(), any_plan_options())
    @settings(deadline=None)
    def test_rows_and_restore_index_are_the_same_on_every_rank(self, batch: Batch, options: dict[str, Any]) -> None:
        plan = cpattn.plan(batch, **options)
        metas = [plan.metadata(cp_rank) for cp_rank in range(plan.cp_size)]
        assert {meta.rows for meta in metas} == {plan.rows}
        assert [meta.num_tokens for meta in metas] == list(plan.rank_tokens)
        for meta in metas:
            assert torch.equal(meta.restore_index, metas[0].restore_index)
            assert torch.equal(meta.extend_key_rows, metas[0].extend_key_rows)
            assert meta.token_index.shape == meta.position_ids.shape == (plan.rows,)


class TestThereAndBack:
    @given(batches(), any_plan_options())
    @settings(max_examples=300, deadline=None)
    def test_shards_restore_to_the_original(self, batch: Batch, options: dict[str, Any]) -> None:
        plan = cpattn.plan(batch, **options)
        metas = [plan.metadata(cp_rank) for cp_rank in range(plan.cp_size)]
        x = 1 + torch.arange(2 * plan.num_tokens).view(-1, 2)
        shards = [cpattn.shard(x, meta) for meta in metas]
        assert torch.equal(torch.cat(shards)[metas[0].restore_index], x)

        placed = torch.zeros_like(x)
        times = torch.zeros(plan.num_tokens, dtype=torch.int64)
        for meta, rows in zip(metas, shards, strict=True):
            assert rows.shape == (meta.rows, 2)
            assert (rows[meta.num_tokens :] == 0).all()
            index = meta.token_index[: meta.num_tokens].long()
            placed[index] = rows[: meta.num_tokens]
            times.index_add_(0, index, torch.ones_like(index))
        assert torch.equal(placed, x)
        assert (times == 1).all()

    @given(batches(max_requests=6, max_prefix=40, max_extend=40), any_plan_options())
    @settings(deadline=None)
    def test_key_rows_put_each_request_s_keys_in_order(self, batch: Batch, options: dict[str, Any]) -> None:
        """Keys are numbered (request, position); gathered rows and prefixes together fill each row once."""
        plan = cpattn.plan(batch, **options)
        metas = [plan.metadata(cp_rank) for cp_rank in range(plan.cp_size)]
        new = torch.tensor([(i, p + t) for i, (p, e) in enumerate(batch) for t in range(e)], dtype=torch.int64).view(-1, 2)
        prefix = torch.tensor([(i, t) for i, (p, _) in enumerate(batch) for t in range(p)], dtype=torch.int64).view(-1, 2)
        gathered = torch.cat([cpattn.shard(new, meta) for meta in metas])
        for meta in metas:
            keys = torch.full((len(new) + len(prefix), 2), -1)
            keys[meta.extend_key_rows] = gathered[meta.restore_index]
            keys[meta.prefix_key_rows] = prefix
            assert keys.tolist() == [[i, t] for i, (p, e) in enumerate(batch) for t in range(p + e)]
            # Each chunk's keys: k_len of them from k_start on, all of its request, from position 0 on.
            for i, start, length in zip(meta.chunk_request.tolist(), meta.k_start.tolist(), meta.k_len.tolist(), strict=True):
                assert keys[start : start + length].tolist() == [[i, t] for t in range(length)]

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool], ids=str)
    @pytest.mark.parametrize("trailing", [(), (3,), (2, 3), (0,)], ids=str)
    def test_shard_takes_any_dtype_and_any_trailing_shape(self, dtype: torch.dtype, trailing: tuple[int, ...]) -> None:
        plan = cpattn.plan([(0, 7), (3, 4)], 3, pad_to=4)
        metas = [plan.metadata(cp_rank) for cp_rank in range(3)]
        x = torch.randint(0, 2, (11, *trailing)).to(dtype)
        before = x.clone()
        shards = [cpattn.shard(x, meta) for meta in metas]
        assert all(rows.shape == (plan.rows, *trailing) and rows.dtype == dtype for rows in shards)
        assert torch.equal(torch.cat(shards)[metas[0].restore_index], x)
        assert torch.equal(x, before)

    def test_a_shard_is_a_copy(self) -> None:
        meta = cpattn.build_metadata([(0, 4)], cp_size=1, cp_rank=0)
        x = torch.arange(4)
        cpattn.shard(x, meta).zero_()
        assert x.tolist() == [0, 1, 2, 3]

    def test_shard_of_a_strided_tensor(self) -> None:
        meta = cpattn.build_metadata([(0, 6)], cp_size=2, cp_rank=1)
        x = torch.arange(12).view(2, 6).t()
        assert meta.token_index.tolist() == [2, 3, 4]
        assert cpattn.shard(x, meta).tolist() == [[2, 8], [3, 9], [4, 10]]

    @pytest.mark.parametrize("shape", [(7,), (9,), (0, 8), (1, 8)], ids=str)
    def test_shard_refuses_another_number_of_rows(self, shape: tuple[int, ...]) -> None:
        meta = cpattn.build_metadata([(5, 6), (0, 2)], cp_size=2, cp_rank=0)
        with pytest.raises(RowCountError, match=r"8 new tokens \(prefixes not counted\)") as refusal:
            cpattn.shard(torch.zeros(shape), meta)
        assert f"x has shape {shape}" in str(refusal.value)

    @pytest.mark.parametrize("padding", [0, 1, 2])
    def test_shard_ignores_what_an_engine_pads_its_tokens_with(self, padding: int) -> None:
        meta = cpattn.build_metadata([(5, 6), (0, 4)], cp_size=4, cp_rank=1)
        tokens = torch.arange(10.0)
        padded = torch.cat([tokens, torch.full((padding,), torch.nan)])
        assert torch.equal(cpattn.shard(padded, meta), cpattn.shard(tokens, meta))

    def test_shard_refuses_more_rows_than_padding_explains(self) -> None:
        meta = cpattn.build_metadata([(5, 6), (0, 4)], cp_size=4, cp_rank=1)
        with pytest.raises(RowCountError, match="10 new tokens"):
            cpattn.shard(torch.zeros(13), meta)

    def test_shard_refuses_a_shard(self) -> None:
        meta = cpattn.build_metadata([(0, 8)], cp_size=2, cp_rank=0)
        rows = cpattn.shard(torch.zeros(8), meta)
        with pytest.raises(RowCountError, match=r"x has shape \(4,\), but the batch has 8 new tokens.*once"):
            cpattn.shard(rows, meta)

    @pytest.mark.parametrize("x", [[0] * 8, np.zeros(8), None], ids=["list", "array", "None"])
    def test_shard_takes_tensors_alone(self, x: Any) -> None:
        meta = cpattn.build_metadata([(0, 8)], cp_size=2, cp_rank=0)
        with pytest.raises(CPError, match=f"x is a {type(x).__name__}"):
            cpattn.shard(x, meta)

    def test_shard_needs_metadata(self) -> None:
        with pytest.raises(CPError, match=r"meta is a Plan; pass the CPMetadata of this rank: plan\.metadata"):
            cpattn.shard(torch.zeros(8), cpattn.plan([(0, 8)], 2))  # type: ignore[arg-type]


class TestTables:
    def test_token_tables_are_made_when_asked_for(self) -> None:
        meta = cpattn.build_metadata([(5, 6)], cp_size=2, cp_rank=0)
        for name in TOKEN_TENSORS:
            # Whoever wants the one mostly wants the other: both come in one copy.
            assert (name in meta._derived) == (name == "position_ids"), name
            assert getattr(meta, name) is getattr(meta, name), name
            assert name in meta._derived, name

    def test_derive_builds_once(self) -> None:
        meta = cpattn.build_metadata([(0, 6)], cp_size=2, cp_rank=0)
        calls = []

        def build() -> list[int]:
            calls.append(0)
            return [len(calls)]

        assert meta.derive(("steps", 2), build) is meta.derive(("steps", 2), build)
        assert meta.derive(("steps", 3), build) == [2]
        assert len(calls) == 2

    def test_a_derived_none_is_kept_too(self) -> None:
        meta = cpattn.build_metadata([(0, 6)], cp_size=2, cp_rank=0)
        calls: list[int] = []
        assert meta.derive("nothing", lambda: calls.append(0)) is None
        assert meta.derive("nothing", lambda: calls.append(0)) is None
        assert len(calls) == 1

    @given(batches(), any_plan_options())
    @settings(deadline=None)
    def test_chunk_tensors_are_aligned_views_of_one_buffer(self, batch: Batch, options: dict[str, Any]) -> None:
        meta = cpattn.plan(batch, **options).metadata(0)
        tensors = [getattr(meta, name) for name in CHUNK_TENSORS]
        assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
        for tensor in tensors:
            assert tensor.is_contiguous()
            assert tensor.storage_offset() % 4 == 0
            assert tensor.data_ptr() % 16 == 0

    @given(st.lists(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=9), max_size=6))
    def test_tables_on_a_device(self, columns: list[list[int]]) -> None:
        tables = {f"table {n}": np.array(column, dtype=np.int64) for n, column in enumerate(columns)}
        tensors = DeviceTables(tables, torch.device("cpu"))
        views = [tensors[name] for name in tables]
        assert len({tensor.untyped_storage().data_ptr() for tensor in views}) <= 1
        taken: set[int] = set()
        for tensor, column in zip(views, columns, strict=True):
            assert tensor.dtype == torch.int32
            assert tensor.tolist() == column
            assert tensor.data_ptr() % 16 == 0
            span = set(range(tensor.storage_offset(), tensor.storage_offset() + len(column)))
            assert not span & taken
            taken |= span

    @given(st.lists(st.tuples(st.integers(0, 2**31 - 100), st.integers(0, 9)), max_size=12))
    @settings(deadline=None)
    def test_expand_runs(self, runs: list[tuple[int, int]]) -> None:
        first = np.array([begin for begin, _ in runs], dtype=np.int64)
        lengths = np.array([length for _, length in runs], dtype=np.int64)
        expected = [begin + i for begin, length in runs for i in range(length)]
        on_host = expand_runs_on_host(first, lengths, len(expected))
        on_device = expand_runs_on_device(torch.tensor(first, dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32), len(expected))
        assert on_host.dtype == np.int32
        assert on_device.dtype == torch.int32
        assert on_host.tolist() == on_device.tolist() == expected

    @given(batches(max_requests=6), any_plan_options())
    @settings(max_examples=25, deadline=None)
    def test_long_tables_are_made_alike(self, batch: Batch, options: dict[str, Any]) -> None:
        """Elsewhere than on the CPU long tables are expanded on the device; here, on CPU tensors."""
        plan = cpattn.plan(batch, **options)
        for cp_rank in range(plan.cp_size):
            here, there = plan.metadata(cp_rank), plan.metadata(cp_rank)
            for name in TOKEN_TENSORS:
                short = getattr(here, name)
                with patch.object(device_tables, "are_expanded_on_host", lambda total, device: False):
                    long = getattr(there, name)
                assert short.dtype == long.dtype, name
                assert torch.equal(short, long), name

    @pytest.mark.parametrize(
        ("batch", "options"),
        [
            pytest.param([(2**31 - 2, 1)], {"cp_size": 1}, id="longest prefix"),
            pytest.param([(0, 2**31 - 2)], {"cp_size": 2}, id="longest extend"),
            pytest.param([(2**30, 2**29), (2**29 - 9, 8)], {"cp_size": 8}, id="two long requests"),
            pytest.param([(2**31 - 100, 4), (50, 4)], {"cp_size": 2, "pad_to": 1024}, id="long prefixes beside much padding"),
            pytest.param([(2**30, 0), (5, 1)], {"cp_size": 2, "pad_to": 2**29}, id="as much padding as prefix"),
        ],
    )
    def test_tables_fit_int32_or_the_batch_is_refused(self, batch: Batch, options: dict[str, Any]) -> None:
        """All lengths and row numbers are >= 0, so that one that went around shows by its sign."""
        try:
            metas = [(plan := cpattn.plan(batch, **options)).metadata(cp_rank) for cp_rank in range(options["cp_size"])]
        except CPError:
            return
        for meta in metas:
            assert all((table >= 0).all() for table in [meta._tables[name] for name in meta._host])
            for column in cp_metadata._COLUMNS.values():
                assert ((column(meta) >= 0) & (column(meta) < 2**31)).all()
            assert (meta.k_len.long() <= torch.tensor(plan.total_lens)[meta.chunk_request.long()]).all()
            # Of the gathered rows, and of the keys in order.
            assert max(plan.cp_size * plan.rows, int(plan.total_lens.sum())) <= 2**31

    def test_repr_says_what_matters(self) -> None:
        meta = cpattn.build_metadata([(0, 8), (10, 3)], cp_size=2, cp_rank=1, pad_to=4)
        assert repr(meta) == "CPMetadata(rank 1 of 2: 5 tokens in 8 rows, 3 chunks, on cpu)"

    @pytest.mark.parametrize("device", ["cpu", torch.device("cpu")], ids=["string", "device"])
    def test_device(self, device: Any) -> None:
        meta = cpattn.build_metadata([(5, 6)], cp_size=2, cp_rank=0, device=device)
        assert meta.device == torch.device("cpu")
        assert all(getattr(meta, name).device == meta.device for name in (*CHUNK_TENSORS, *TOKEN_TENSORS))
