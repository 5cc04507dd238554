"""shard, unshard and cp_attention as a caller on one rank meets them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from inputs.cases import AttentionCase
from inputs.problems import CAUSAL, problem

import cpattn
from cpattn.attention.auto import able_backends


def test_one_rank_needs_no_process_group() -> None:
    case = AttentionCase([(7, 12), (0, 5)])
    plan = cpattn.plan(case.batch, 1)
    case.check([case.on_rank(plan, 0, None, "ring", "auto")], plan, "ring", "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("shape", [(), (3,), (2, 0), (2, 4)], ids=str)
def test_shard_takes_any_dtype_and_shape(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    plan = cpattn.plan([(0, 7), (3, 0), (9, 4)], 3, pad_to=8)
    x = torch.randint(0, 2, (11, *shape)).to(dtype)
    for rank in range(3):
        meta = plan.metadata(rank)
        local = cpattn.shard(x, meta)
        assert local.shape == (8, *shape)
        assert local.dtype == dtype
        assert torch.equal(local[: meta.num_tokens], x[meta.token_index[: meta.num_tokens].long()])
        assert not local[meta.num_tokens :].any()


def test_shard_refuses_another_number_of_rows() -> None:
    meta = cpattn.build_metadata([(4, 6)], cp_size=2, cp_rank=0)
    with pytest.raises(cpattn.RowCountError, match=r"x has shape \(10, 2\), but the batch has 6 new tokens \(prefixes not counted\)"):
        cpattn.shard(torch.zeros(10, 2), meta)
    with pytest.raises(cpattn.TensorMismatchError, match="x is on meta, but the metadata is on cpu"):
        cpattn.shard(torch.zeros(6, 2, device="meta"), meta)
    with pytest.raises(cpattn.CPError, match=r"meta is a Plan; pass the CPMetadata of this rank: plan.metadata"):
        cpattn.shard(torch.zeros(6, 2), meta.plan)


def test_without_a_launcher_the_error_says_how_to_launch() -> None:
    meta = cpattn.build_metadata([(0, 8)], cp_size=2, cp_rank=0)
    q = torch.zeros(4, 1, 8)
    with pytest.raises(cpattn.GroupError, match="launch with torchrun --nproc-per-node 2"):
        cpattn.cp_attention(q, q, q, meta)


def test_strided_inputs_are_taken() -> None:
    case = AttentionCase([(0, 20)], heads=2, kv_heads=2)
    qkv = torch.stack([case.q, case.k, case.v], dim=1)
    transposed = case.q.transpose(1, 2).contiguous().transpose(1, 2)
    meta = cpattn.plan(case.batch, 1).metadata(0)
    out = cpattn.cp_attention(transposed, qkv[:, 1], qkv[:, 2], meta)
    assert torch.equal(out, cpattn.cp_attention(case.q, case.k, case.v, meta))


def test_layers_of_other_layouts_and_options_share_metadata() -> None:
    """What is kept of one call serves no other kind of call."""
    plan = cpattn.plan([(3, 9), (0, 5)], 1)
    shared = plan.metadata(0)
    wide = torch.randn(16, 8, 32)
    variants: list[dict[str, Any]] = [{}, {"window": 4}, {"softcap": 2.0}, {"scale": 1}, {"scale": 1.5}, {"sinks": torch.randn(4)}]

    def inputs(layer: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(layer)
        return [torch.randn(14, heads, 16, generator=generator) for heads in (4, 2, 2)]

    def calls() -> Iterator[tuple[list[torch.Tensor], dict[str, Any]]]:
        for layer in range(2):
            q, k, v = inputs(layer)
            transposed = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
            for new in ([q, k, v], [wide[:14, :4, :16], k, v], transposed, [q, k, v[..., :8]], [x.double() for x in (q, k, v)]):
                cached = [torch.randn(3, *x.shape[1:], dtype=x.dtype) for x in new[1:]]
                for options in (*variants, {"sinks": torch.randn(4)}):
                    yield new, {"kv_cache": cpattn.PackedKV(*cached), **options}
            yield [q, k, v], {"kv_cache": cpattn.PackedKV(torch.randn(2, 3, 16).transpose(0, 1), torch.randn(16, 2, 3).permute(2, 1, 0))}

    for (q, k, v), options in calls():
        for strategy in ("all_gather", "ring"):
            got, got_lse = cpattn.cp_attention(q, k, v, shared, strategy=strategy, return_lse=True, **options)
            want, want_lse = cpattn.cp_attention(q, k, v, plan.metadata(0), strategy=strategy, return_lse=True, **options)
            assert torch.equal(got, want)
            assert torch.equal(got_lse, want_lse)
    q, k, v = inputs(0)
    cache = options["kv_cache"]
    mistakes: list[dict[str, Any]] = [{"scale": True}, {"overlap": True}, {"window": 0}]
    for wrong in mistakes:
        with pytest.raises(cpattn.CPError, match="{}=".format(*wrong)):
            cpattn.cp_attention(q, k, v, shared, kv_cache=cache, **wrong)
    with pytest.raises(cpattn.CPError, match="requires a gradient"):
        cpattn.cp_attention(q.requires_grad_(), k, v, shared, kv_cache=cache)


def test_gradients_are_refused_only_where_they_are_recorded() -> None:
    q = torch.zeros(4, 1, 8, requires_grad=True)
    meta = cpattn.build_metadata([(0, 4)], 1, 0)
    with pytest.raises(cpattn.UnsupportedError, match=r"q, k, v require a gradient.*torch.no_grad\(\)"):
        cpattn.cp_attention(q, q, q, meta)
    with torch.no_grad():
        assert not cpattn.cp_attention(q, q, q, meta).requires_grad


def test_window_of_any_integer_type_counts() -> None:
    import numpy as np

    case = AttentionCase([(0, 30)])
    meta = cpattn.plan(case.batch, 1).metadata(0)
    narrow = cpattn.cp_attention(case.q, case.k, case.v, meta, window=5)
    assert torch.equal(cpattn.cp_attention(case.q, case.k, case.v, meta, window=np.int64(5)), narrow)
    assert not torch.equal(cpattn.cp_attention(case.q, case.k, case.v, meta), narrow)


def test_a_window_as_long_as_the_longest_request_lets_any_backend_serve() -> None:
    case = AttentionCase([(10, 20)])
    meta = cpattn.plan(case.batch, 1).metadata(0)
    assert cpattn.explain(case.q, case.k, case.v, meta, window=30)["cpu"] == "chosen"
    assert cpattn.explain(case.q, case.k, case.v, meta, window=29)["cpu"] == "it has no sliding window"


@pytest.mark.parametrize("options", [{}, {"overlap": 2}, {"overlap": 2, "scale": 0.3, "softcap": 5.0}], ids=str)
def test_explain_is_asked_with_the_arguments_of_the_call(options: dict[str, Any]) -> None:
    group, meta = cpattn.testing.SoloCommunicator(0, 2), cpattn.build_metadata([(0, 64)], 2, 0)
    q, k = torch.randn(32, 4, 16), torch.randn(32, 2, 16)
    call = cpattn.prepare(q, k, k, meta, group=group, **options)
    assert call.problem.overlap == options.get("overlap", 1)
    explained = cpattn.explain(q, k, k, meta, group=group, **options)
    assert explained["strategy"].partition(":")[0] == call.strategy.name
    assert explained[call.backend.name] == "chosen"


def test_explain_refuses_what_the_call_would() -> None:
    meta = cpattn.build_metadata([(8, 64)], 2, 0, owner=cpattn.Striped())
    q, k, pages = torch.randn(32, 4, 16), torch.randn(32, 2, 16), torch.zeros(2, 9, 16, 2, 16)
    cache = cpattn.PagedKV(pages[0], pages[1], torch.arange(9).view(1, 9))
    with pytest.raises(cpattn.UnsupportedError, match="of a sharded cache it brings all heads at once; leave overlap out"):
        cpattn.explain(q, k, k, meta, kv_cache=cache, window=4, strategy="all_gather", overlap=2)
    with pytest.raises(cpattn.OptionError, match="scale=0; pass a positive number"):
        cpattn.explain(q, k, k, meta, kv_cache=cache, scale=0)


def test_outputs_are_fresh_memory() -> None:
    case = AttentionCase([(4, 9)])
    meta = cpattn.plan(case.batch, 1).metadata(0)
    first = cpattn.cp_attention(case.q, case.k, case.v, meta, kv_cache=case.prefix)
    kept = first.clone()
    cpattn.cp_attention(case.q + 1, case.k - 1, case.v * 2, meta, kv_cache=case.prefix)
    assert torch.equal(first, kept)
    x = torch.zeros(9, 2)
    assert cpattn.unshard(x, meta).data_ptr() != x.data_ptr()


def test_an_unsupported_dtype_is_refused_with_every_backend_s_reason() -> None:
    with pytest.raises(cpattn.UnsupportedError, match=r"no backend can serve this call: cpu: it takes .*; reference: it takes"):
        able_backends("auto", problem(dtype=torch.float8_e4m3fn), CAUSAL)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), True, "1"])
def test_scale_is_a_positive_number(scale: float) -> None:
    meta = cpattn.build_metadata([(0, 4)], 1, 0)
    q = torch.zeros(4, 1, 16)
    with pytest.raises(cpattn.OptionError, match="pass a positive number"):
        cpattn.cp_attention(q, q, q, meta, scale=scale)


def test_output_is_contiguous_where_v_is_narrower() -> None:
    case = AttentionCase([(0, 20)], head_dim=16, v_head_dim=8)
    meta = cpattn.plan(case.batch, 1).metadata(0)
    assert cpattn.cp_attention(case.q, case.k, case.v, meta, backend="cpu").is_contiguous()


def test_modes_of_torch_change_nothing() -> None:
    case = AttentionCase([(6, 20)])
    with torch.inference_mode(), torch.device("meta"):
        meta = cpattn.build_metadata(case.batch, 1, 0, device="cpu")
        cpattn.shard(case.q, meta)
    out = cpattn.cp_attention(case.q, case.k, case.v, meta, kv_cache=case.prefix, backend="reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(cpattn.cp_attention(case.q, case.k, case.v, meta, kv_cache=case.prefix, backend="reference"), out)
    x = case.q.clone().requires_grad_()
    cpattn.shard(x, meta).sum().backward()  # type: ignore[no-untyped-call]


def test_under_torch_compile_it_runs_eagerly() -> None:
    case = AttentionCase([(0, 20)])
    meta = cpattn.plan(case.batch, 1).metadata(0)
    attend = torch.compiler.disable(cpattn.cp_attention)  # type: ignore[no-untyped-call]
    model = torch.compile(lambda q: attend(q * 2, case.k, case.v, meta) + 1, backend="eager")
    assert torch.equal(model(case.q), cpattn.cp_attention(case.q * 2, case.k, case.v, meta) + 1)
