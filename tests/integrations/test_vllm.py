"""cpattn.integrations.vllm on stand-ins for vLLM's modules. ``make test-engines`` has the same with vLLM's own."""

from __future__ import annotations

import importlib
import logging
import re
import sys
from dataclasses import fields, make_dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import vllm_stand_in
from engines.vllm_programs import BATCH, BLOCK_SIZE, CONFIG, HEAD_DIM, HEADS, KV_HEADS, SCALE, check_steps, common_of, table_of

import cpattn
from cpattn.integrations import vllm as cpattn_vllm
from cpattn.integrations.vllm import custom
from cpattn.integrations.vllm.register import BACKEND, plugin
from cpattn.testing import oracle_attention


@pytest.mark.parametrize("size", [1, 2, 3])
def test_there_and_back(size: int) -> None:
    table = table_of(BATCH)
    for rank in range(size):
        common = common_of(BATCH, size, rank, table, num_tokens=40, num_reqs=7)
        plan = cpattn_vllm.plan_of(common, size, 2)
        assert plan.batch == (*BATCH, (0, 0), (0, 0))
        assert common.positions.tolist() == [40, *range(24, 33), 0, *range(21), *[0] * 8]
        slots, position = common.slot_mapping, common.positions
        assert (slots[32:] == -1).all()
        request = torch.arange(5).repeat_interleave(torch.tensor([1, 9, 1, 21, 0]))
        mine = (position[:32] // 2 % size == rank).nonzero()[:, 0]
        assert (slots[:32] >= 0).nonzero()[:, 0].tolist() == mine.tolist()
        number = position[mine] // (2 * size) * 2 + position[mine] % 2
        page = table[request[mine], number // BLOCK_SIZE]
        assert slots[mine].tolist() == (page * BLOCK_SIZE + number % BLOCK_SIZE).tolist()
        if size > 1:
            assert common.dcp_local_seq_lens.tolist() == plan.held_lens[:, rank].tolist()


def test_a_step_that_a_plan_cannot_be_made_of() -> None:
    common = common_of(BATCH, 1, 0, table_of(BATCH))
    for name, value, error, message in [
        ("causal", False, cpattn.UnsupportedError, "causal=False; cpattn has causal attention alone"),
        ("causal", torch.ones(5, dtype=torch.int32), cpattn.UnsupportedError, "causal=a tensor of torch.int32"),
        ("mm_req_doc_ranges", {0: [(1, 2)]}, cpattn.UnsupportedError, "both directions within images"),
        ("rswa_prefix_lens", torch.ones(5), cpattn.UnsupportedError, "rswa_prefix_lens is given"),
        ("encoder_seq_lens", torch.ones(5), cpattn.UnsupportedError, "cross attention"),
        ("seq_lens_cpu_upper_bound", None, cpattn.UnsupportedError, "seq_lens_cpu_upper_bound is None"),
        ("seq_lens_cpu_upper_bound", torch.ones(5, device="meta"), cpattn.UnsupportedError, "is on meta"),
        ("seq_lens_cpu_upper_bound", torch.ones(3), cpattn.BatchError, r"shape \(3,\); 5 numbers"),
        ("seq_lens_cpu_upper_bound", torch.tensor([41, 8, 1, 21, 7]), cpattn.BatchError, "gives request 1 9 new tokens, .* says 8 in all"),
        ("query_start_loc_cpu", torch.tensor([1, 2, 11, 12, 33, 33]), cpattn.BatchError, "begins at 1"),
    ]:
        with pytest.raises(error, match=message):
            cpattn_vllm.batch_of(SimpleNamespace(**{**vars(common), name: value}))


def test_fields_of_a_plan_that_splits_rows_are_refused() -> None:
    meta = cpattn.build_metadata(BATCH, 2, 0)
    with pytest.raises(cpattn.PlanError, match="queries='all' and owner="):
        cpattn_vllm.common_fields(meta, table_of(BATCH), BLOCK_SIZE)
    with pytest.raises(cpattn.PlanError, match="num_tokens=30, num_reqs=None; the step has 32 new tokens of 5 requests"):
        common_of(BATCH, 1, 0, table_of(BATCH), num_tokens=30)


def test_prefill_chunks() -> None:
    plan = cpattn.plan([(9, 1), (0, 5), (3, 1), (0, 0), (4, 16)], 2, partition=cpattn_vllm.prefill_chunks([0, 1, 0, 1, 1]))
    assert [tuple(map(int, chunk)) for chunk in zip(*plan.chunk_table, strict=True)] == [
        (0, 0, 1, 0),  # a decode, and the next one on the next rank
        *[(1, 0, 2, 0), (1, 2, 2, 1), (1, 4, 1, 1)],  # too short for its fourth chunk
        (2, 0, 1, 1),
        *[(4, 0, 4, 0), (4, 4, 4, 1), (4, 8, 4, 1), (4, 12, 4, 0)],
    ]
    with pytest.raises(cpattn.PlanError, match="is_prefilling has 2 entries for a batch of 1 requests"):
        cpattn.plan([(0, 5)], 2, partition=cpattn_vllm.prefill_chunks([True, False]))


def test_a_cache_of_another_form_is_refused() -> None:
    with pytest.raises(cpattn.TensorMismatchError, match=r"shape \(2, 10, 4, 32\).*D = 32"):
        cpattn_vllm.pages_of(torch.zeros(2, 10, 4, 32), 32, torch.zeros(1, 1).int())


@pytest.fixture(scope="module")
def backend() -> Any:
    with vllm_stand_in.stand_in():
        return custom.attention_backend.__wrapped__()  # which does not keep it


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("layer", [{}, {"sliding_window": 5, "logits_soft_cap": 3.0}], ids=["plain", "window and softcap"])
def test_the_backend_is_exact(backend: Any, size: int, layer: dict[str, Any]) -> None:
    check_steps(backend, size, "cpu", torch.float32, **layer)


@pytest.mark.parametrize("kv_cache_dtype", ["fp8", "fp8_e5m2"])
def test_caches_in_fp8(backend: Any, kv_cache_dtype: str) -> None:
    check_steps(backend, 1, "cpu", torch.float32, kv_cache_dtype=kv_cache_dtype)
    vllm_stand_in.THREAD.group = cpattn.LoopbackGroup(2).transport(0)
    with pytest.raises(cpattn.UnsupportedError, match=f"kv_cache_dtype='{kv_cache_dtype}' under decode context parallelism"):
        backend.get_impl_cls()(HEADS, HEAD_DIM, SCALE, KV_HEADS, kv_cache_dtype=kv_cache_dtype)


def test_sinks_and_the_run_that_measures_memory(backend: Any) -> None:
    vllm_stand_in.THREAD.group = None
    q, (k, v), sinks = torch.randn(9, HEADS, HEAD_DIM), torch.randn(2, 9, KV_HEADS, HEAD_DIM), torch.randn(HEADS)
    impl = backend.get_impl_cls()(HEADS, HEAD_DIM, SCALE, KV_HEADS, sinks=sinks)
    kv_cache, table = torch.zeros(5, KV_HEADS, BLOCK_SIZE, 2 * HEAD_DIM), torch.tensor([[3, 1, 4]]).int()
    assert not impl.forward(None, q, k, v, torch.empty(0), None, torch.ones_like(q)).any()
    impl.do_kv_cache_update(None, k, v, torch.empty(0), torch.arange(9))  # no cache yet
    common = common_of([(0, 9)], 1, 0, table)
    step = backend.get_builder_cls()(SimpleNamespace(dcp_sharded=True), ["layer"], CONFIG, torch.device("cpu")).build(0, common)
    impl.do_kv_cache_update(None, k, v, kv_cache, common.slot_mapping)
    expected, _ = oracle_attention(q, k, v, [(0, 9)], scale=SCALE, sinks=sinks)
    torch.testing.assert_close(impl.forward(None, q, k, v, kv_cache, step, torch.empty_like(q)), expected.float())
    with pytest.raises(cpattn.UnsupportedError, match="a quantized output"):
        impl.forward(None, q, k, v, kv_cache, step, torch.empty_like(q), output_scale=torch.ones(1))


def test_layers_and_runs_that_it_cannot_serve(backend: Any) -> None:
    vllm_stand_in.THREAD.group = None
    cases: list[tuple[dict[str, Any], str]] = [
        ({"attn_type": "encoder_only"}, "attn_type='encoder_only'"),
        ({"kv_cache_dtype": "nvfp4"}, "kv_cache_dtype='nvfp4'"),
        ({"alibi_slopes": [0.5]}, "alibi_slopes"),
        ({"use_alibi_sqrt": True}, "use_alibi_sqrt=True"),
    ]
    for options, what in cases:
        with pytest.raises(cpattn.UnsupportedError, match=f"a layer asks for {what}, which cpattn does not have here"):
            backend.get_impl_cls()(HEADS, HEAD_DIM, SCALE, KV_HEADS, **options)
    speculative = SimpleNamespace(speculative_config=object(), parallel_config=CONFIG.parallel_config)
    with pytest.raises(cpattn.UnsupportedError, match="speculative decoding is on"):
        backend.get_builder_cls()(SimpleNamespace(dcp_sharded=True), ["layer"], speculative, torch.device("cpu"))


def test_an_interface_that_is_not_known_is_refused() -> None:
    class NewForward(vllm_stand_in.AttentionImpl):
        def forward(self, layer: Any, query: Any, key: Any, value: Any, cache: Any) -> None: ...  # type: ignore[override]

    def without(cls: type, name: str) -> type:
        return type(cls.__name__, (), {key: value for key, value in vars(cls).items() if key != name})

    def renamed(field: str) -> type:
        known = fields(vllm_stand_in.CommonAttentionMetadata)
        return make_dataclass("CommonAttentionMetadata", [f"{x.name}_2" if x.name == field else x.name for x in known])

    old = vllm_stand_in.AttentionBackend
    for module, name, value, message in [
        (
            "vllm.v1.attention.backend",
            "AttentionImpl",
            NewForward,
            r"AttentionImpl.forward takes \(self, layer, query, key, val",
        ),
        ("vllm.v1.attention.backend", "AttentionBackend", without(old, "supports_sink"), "AttentionBackend has no supports_sink"),
        (
            "vllm.v1.attention.backend",
            "AttentionImpl",
            without(vllm_stand_in.AttentionImpl, "forward"),
            "AttentionImpl has no method forward",
        ),
        ("vllm.v1.attention.backend", "CommonAttentionMetadata", object, "CommonAttentionMetadata has no query_start_loc_cpu, seq_"),
        # It asks for another attention than a causal one, under a name that nobody would look for.
        ("vllm.v1.attention.backend", "CommonAttentionMetadata", renamed("mm_req_doc_ranges"), "Metadata has no mm_req_doc_ranges;"),
        ("vllm.v1.attention.backend", "CommonAttentionMetadata", renamed("rswa_prefix_lens"), "Metadata has no rswa_prefix_lens;"),
        ("vllm.v1.attention.backend", "CommonAttentionMetadata", renamed("encoder_seq_lens"), "Metadata has no encoder_seq_lens;"),
        ("vllm.distributed.parallel_state", "get_dcp_group", None, "parallel_state.get_dcp_group cannot be imported"),
    ]:
        with vllm_stand_in.stand_in() as modules:
            if value is None:
                delattr(modules[module], name)
            else:
                setattr(modules[module], name, value)
            with pytest.raises(cpattn.UnsupportedError, match=f"another attention interface than 0.33.*{message}"):
                custom.attention_backend.__wrapped__()


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is here")
def test_without_vllm() -> None:
    with pytest.raises(cpattn.UnsupportedError, match=r"there is no vLLM here with a backend CUSTOM to register \(ModuleNotFoundError"):
        cpattn_vllm.register()
    plugin()
    with pytest.raises(cpattn.UnsupportedError, match=r"vllm\.v1\.attention\.backend\.AttentionBackend cannot be imported"):
        _ = custom.CPAttentionBackend
    with pytest.raises(AttributeError, match="no attribute 'Other'"):
        _ = custom.Other


@pytest.mark.parametrize("error", [RuntimeError("no driver\nin this container"), OSError("libcudart"), KeyError("x")], ids=repr)
def test_the_plugin_raises_nothing(error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> Any:
        raise error

    # By its module, as the package has a function of that name.
    monkeypatch.setattr(sys.modules[plugin.__module__], "_registry", broken)
    plugin()
    (line,) = caplog.records
    assert (line.name, line.levelno, line.exc_info) == ("vllm.cpattn", logging.WARNING, None)
    what = " ".join(str(error).split())
    assert line.getMessage() == f"cpattn is not registered as vLLM's backend CUSTOM: {type(error).__name__}: {what}"


def test_register() -> None:
    with vllm_stand_in.stand_in() as modules:
        member = modules["vllm.v1.attention.backends.registry"].AttentionBackendEnum.CUSTOM
        plugin()
        module, name = member.path.rsplit(".", 1)
        assert (module, name) == (custom.__name__, custom.NAME)
        member.path = "another.plugin.Backend"
        plugin()
        assert member.path == "another.plugin.Backend"
        cpattn_vllm.register()
        assert member.path == BACKEND
        made = getattr(importlib.import_module(module), name)
        custom.attention_backend.cache_clear()
    assert (made.__module__, made.__qualname__, made.get_name()) == (module, name, "CUSTOM")


def test_the_package_names_the_plugin() -> None:
    project = (Path(cpattn.__file__).parents[1] / "pyproject.toml").read_text()
    found = re.search(r'entry-points."vllm.general_plugins"\]\ncpattn = "(.+):(.+)"', project)
    assert found is not None
    module, name = found.groups()
    assert getattr(importlib.import_module(module), name) is plugin
