"""The plugin for SGLang without SGLang: from a forward batch to a plan, what a layer asks for, and what is refused.

``tests/integrations/test_sglang_engine.py`` runs it in SGLang's own classes.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
import random
import re
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import cpattn
from cpattn.errors import BatchError, UnsupportedError
from cpattn.integrations.sglang import engine, interface, replace_zigzag
from cpattn.integrations.sglang.asked import Asked, asked_of
from cpattn.integrations.sglang.interface import CALLS, FIELDS, STRATEGY, Modules, check_interface
from cpattn.integrations.sglang.plugin import plugin, strategy_over
from cpattn.integrations.sglang.step import TWO_BLOCKS, Step, batch_of, with_rows
from cpattn.integrations.sglang.strategy import CPAttnStrategy
from cpattn.integrations.sglang.turns import attend_in_turns, turns_of
from cpattn.testing import relative_rmse, rmse_bound, run_loopback
from cpattn.testing.oracle import oracle_attention

EXTEND = SimpleNamespace(is_context_parallel_extend=lambda: True)


def test_a_batch_of_sglangs_lengths() -> None:
    assert batch_of(6, [10, 5], [4, 2]) == [(6, 4), (3, 2)]
    # What pads the batch: rows, and requests with nothing new.
    assert batch_of(16, [10, 5, 1], [4, 2, 0]) == [(6, 4), (3, 2), (1, 0)]
    assert batch_of(6, [4, 2], None) == [(0, 4), (0, 2)]
    assert batch_of(6, None, None) == [(0, 6)]


@pytest.mark.parametrize(
    ("num_tokens", "seqs_len", "extend_seqs_len"),
    [(5, [10, 5], [4, 2]), (6, [10], [4, 2]), (6, None, [4, 2]), (6, [3, 5], [4, 2]), (6, [10, 5], [7, -1])],
    ids=["too few tokens", "a length missing", "unknown what is cached", "fewer tokens than new ones", "a negative length"],
)
def test_lengths_that_do_not_go_together(num_tokens: int, seqs_len: list[int] | None, extend_seqs_len: list[int]) -> None:
    with pytest.raises(BatchError, match=rf"num_tokens={num_tokens}, seqs_len=.*report this with the release of SGLang"):
        batch_of(num_tokens, seqs_len, extend_seqs_len)


def strategy(cp_size: int, cp_rank: int = 0) -> CPAttnStrategy:
    made = CPAttnStrategy()
    made.cp_size, made.cp_rank = cp_size, cp_rank
    return made


@pytest.mark.parametrize(
    ("extends", "applies"),
    [([64, 1], True), ([1] * 8, True), ([3, 0, 5], True), ([7], False), ([1] * 7, False)],
    ids=["one short", "all of one token", "one with nothing new", "seven tokens", "seven requests"],
)
def test_no_batch_is_refused_for_a_short_request(extends: list[int], applies: bool) -> None:
    batch = SimpleNamespace(forward_mode=EXTEND, extend_seq_lens_cpu=extends)
    # SGLang counts its padding; only tokens count here.
    assert strategy(4).can_apply(64, batch) is applies
    assert not strategy(1).can_apply(64, batch)
    batch.forward_mode = SimpleNamespace(is_context_parallel_extend=lambda: False)
    assert not strategy(4).can_apply(64, batch)


def test_the_plan_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "device", lambda: torch.device("cpu"))
    step = strategy(4, 1).build_metadata(200, [200, 31, 61], [100, 31, 61])
    assert (step.bs, step.total_seq_lens) == (3, 192)
    assert step.meta.plan == cpattn.plan([(100, 100), (0, 31), (0, 61)], 4, partition="auto", pad_to=8)
    assert step.per_rank_actual_token == [48] * 4
    assert step.per_rank_logical_token is None
    assert step.max_rank_len == [48] * 4
    short = strategy(4, 3).build_metadata(9, [9, 1], [8, 1])
    assert sorted(short.per_rank_actual_token) == [2, 2, 2, 3]
    alone = strategy(4).build_metadata(40, [140, 1], [40, 0])
    assert alone.meta.plan == cpattn.plan([(100, 40), (1, 0)], 4, pad_to=8)


def test_short_requests_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "device", lambda: torch.device("cpu"))
    lengths = [500 + 10 * i for i in range(32)]
    step = strategy(4).build_metadata(sum(lengths), lengths, lengths)
    assert step.meta.plan.partition == "whole"
    assert max(step.per_rank_actual_token) - min(step.per_rank_actual_token) <= 1


def test_fields_of_two_blocks_are_refused_when_read() -> None:
    step = Step(cpattn.build_metadata([(0, 9)], 2, 0))
    for name in FIELDS - TWO_BLOCKS:
        assert hasattr(step, name)
    # What SGLang asks for without knowing whether it is there.
    assert getattr(step, "graph_num_tokens", None) is None
    with pytest.raises(UnsupportedError, match="reads total_q_prev_tokens, which says where two blocks"):
        step.total_q_prev_tokens  # noqa: B018


def test_rows_are_cut_or_padded() -> None:
    x = torch.arange(6.0).view(2, 3)
    assert with_rows(x, 2) is x
    assert with_rows(x, 1).tolist() == [[0.0, 1.0, 2.0]]
    assert with_rows(x, 4, dim=-1).tolist() == [[0.0, 1.0, 2.0, 0.0], [3.0, 4.0, 5.0, 0.0]]


@pytest.mark.parametrize("partition", ["zigzag", "whole"])
def test_turns_cover_each_row_once(partition: str) -> None:
    rng = random.Random(0)
    for _ in range(20):
        batch = [(rng.randint(0, 9), rng.randint(0, 20)) for _ in range(rng.randint(1, 5))] + [(3, 8)]
        plan = cpattn.plan(batch, 3, partition=partition)
        for rank in range(3):
            meta = plan.metadata(rank)
            # Each query is its own position, which with the keys of its range says what it sees.
            q = meta.position_ids.double()[:, None, None]
            turns = turns_of(meta)
            assert len(turns) <= 2
            seen = attend_in_turns(q, turns, meta.num_tokens, partial(turn_seen, batch))
            assert torch.equal(seen[: meta.num_tokens], q[: meta.num_tokens] + 1)
            assert not seen[meta.num_tokens :].any()


def turn_seen(batch: list[tuple[int, int]], q: Tensor, cu_seqlens_q: Tensor, k_len: Tensor, max_seqlen_q: int) -> Tensor:
    """How many keys each query sees, as a kernel would have it."""
    lengths = cu_seqlens_q.diff().tolist()
    assert len(lengths) == len(k_len) == len(batch)
    assert max(lengths) == max_seqlen_q
    assert sum(lengths) == len(q)
    parts = [torch.arange(keys - n, keys) + 1 for n, keys in zip(lengths, k_len.tolist(), strict=True)]
    return torch.cat(parts).double()[:, None, None]


class MHATokenToKVPool:
    """By its name SGLang's plain pool."""

    is_quantized_kv_cache = False


class SWAKVPool:
    """By its name SGLang's pool of two, one for layers with a window."""

    def __init__(self, full_kv_pool: Any, swa_kv_pool: Any, *, has_own: bool) -> None:
        self.full_kv_pool, self.swa_kv_pool = full_kv_pool, swa_kv_pool
        self.layers_mapping = {5: (0, has_own)}


def attention_of(q: Tensor, pages: Tensor, page_table: Tensor, **other: Any) -> Callable[..., Tensor]:
    """A function like that of SGLang's backend, with the same name around the same names."""
    self = SimpleNamespace(token_to_kv_pool=other.get("pool", MHATokenToKVPool()))
    layer = SimpleNamespace(layer_id=5, tp_k_head_num=1, scaling=0.5, logit_cap=other.get("logit_cap", 0.0))
    key_cache, value_cache = pages.unbind()
    causal, window_size = other.get("causal", True), (other.get("left", -1), 0)
    use_local_attn = use_cascade_attn = other.get("blocks", False)
    cu_seqlens_k, kwargs = None, other.get("kwargs", {})

    def _fa_cp_attn(*turn: Any) -> Tensor:
        around = self, layer, key_cache, value_cache, page_table, causal, window_size
        raise AssertionError(f"SGLang's kernel attends: {turn, around, use_local_attn, use_cascade_attn, cu_seqlens_k, kwargs}")

    return _fa_cp_attn


def test_what_a_layer_asks_for() -> None:
    q, pages, table = torch.zeros(3, 2, 8), torch.zeros(2, 4, 4, 1, 8), torch.tensor([[1, 2]], dtype=torch.int32)
    asked = asked_of(attention_of(q, pages, table), q)
    assert isinstance(asked, Asked)
    assert (asked.scale, asked.window, asked.softcap, asked.sinks) == (0.5, None, None, None)
    assert asked.cache.k_pages.data_ptr() == pages.data_ptr()
    assert asked.cache.page_table is table
    sinks = torch.zeros(2)
    more = asked_of(attention_of(q, pages, table, left=7, logit_cap=30.0, kwargs={"sinks": sinks}), q)
    assert isinstance(more, Asked)
    assert (more.window, more.softcap, more.sinks is sinks) == (8, 30.0, True)
    for has_own, pools in ((True, (SimpleNamespace(), MHATokenToKVPool())), (False, (MHATokenToKVPool(), SimpleNamespace()))):
        assert isinstance(asked_of(attention_of(q, pages, table, pool=SWAKVPool(*pools, has_own=has_own)), q), Asked)
        other = asked_of(attention_of(q, pages, table, pool=SWAKVPool(*pools, has_own=not has_own)), q)
        assert other == "the pool is a SimpleNamespace"


def test_what_is_left_to_sglangs_kernel() -> None:
    q, pages, table = torch.zeros(3, 2, 8), torch.zeros(2, 4, 4, 1, 8), torch.tensor([[1, 2]], dtype=torch.int32)
    assert asked_of(attention_of(q, pages, table, pool=SimpleNamespace()), q) == "the pool is a SimpleNamespace"
    scales = {"k_descale": table, "v_descale": table}
    fp8 = q.to(torch.float8_e4m3fn)
    assert "queries are torch.float8_e4m3fn" in str(asked_of(attention_of(q, pages.to(fp8.dtype), table, kwargs=scales), fp8))
    assert "queries are torch.bfloat16 and the pool torch.float32" in str(asked_of(attention_of(q, pages, table), q.bfloat16()))
    assert "of SGLang without a version is not the attention of keys and values that cpattn knows of 0.5.23" in str(
        asked_of(lambda *turn: q, q)
    )


def test_that_sglangs_kernel_attends_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(engine, "device", lambda: torch.device("cpu"))
    ours, q = strategy(1), torch.ones(3, 2, 8)
    step = ours.build_metadata(3, [3], [3])
    for _ in range(2):
        ours.run_attention(q, SimpleNamespace(attn_cp_metadata=step), "cpu", once_said)
    (line,) = caplog.records
    assert line.levelno == logging.WARNING
    assert line.getMessage().startswith("SGLang's own kernel attends in the place of cpattn's, as once_said of SGLang")


def once_said(q: Tensor, *turn: Any) -> Tensor:
    return q


@pytest.mark.parametrize(
    ("other", "asked"),
    [
        ({"causal": False}, "attention that is not causal"),
        ({"blocks": True}, r"attention in blocks \(local or cascade\)"),
        ({"kwargs": {"score_mod": 1, "sinks": None, "aux_tensors": 2}}, "aux_tensors=, score_mod="),
    ],
)
def test_what_no_split_of_queries_serves(other: dict[str, Any], asked: str) -> None:
    """SGLang's own kernel would take it, and mean something else."""
    q, pages, table = torch.zeros(3, 2, 8), torch.zeros(2, 4, 4, 1, 8), torch.tensor([[1, 2]], dtype=torch.int32)
    with pytest.raises(
        UnsupportedError, match=rf"layer 5 of this model asks SGLang's kernel for {asked}, but.*without --enable-prefill-cp"
    ):
        asked_of(attention_of(q, pages, table, **other), q)


def test_a_layer_that_attends_to_anothers_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that share keys between layers pass none: they are in the pool already. Another kind of backend is refused."""
    here = threading.local()
    monkeypatch.setattr(engine, "cp_group", lambda: here.transport)
    monkeypatch.setattr(engine, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(engine, "flash_attention", lambda: "FLASH_ATTENTION")
    batch = [(3, 9), (0, 1), (2, 7)]
    torch.manual_seed(0)
    x = torch.randn(17, 4, 8)
    cached = torch.randn(2, 12, 4, 1, 8)
    table = torch.tensor([[1, 2, 3], [4, 0, 0], [5, 6, 7]], dtype=torch.int32)

    def program(transport: Any) -> tuple[Tensor, Tensor]:
        here.transport = transport
        ours = strategy(transport.size, transport.rank)
        forward_batch = SimpleNamespace(attn_cp_metadata=ours.build_metadata(17, [12, 1, 9], [9, 1, 7]))
        rows = ours.shard_hidden_states(x, forward_batch)
        q, k, v = rows[:, :2].contiguous(), rows[:, 2:3], rows[:, 3:]
        pages = cached.clone()
        attend = attention_of(q, pages, table)
        asked = asked_of(attend, q)
        assert isinstance(asked, Asked)
        layer = asked.layer
        ours.materialize_full_kv(forward_batch, layer, k.flatten(1), v.flatten(1))
        first = ours.run_attention(q, forward_batch, "cpu", attend)
        again = ours.run_attention(q, forward_batch, "cpu", attend)
        torch.testing.assert_close(again, first)
        with pytest.raises(UnsupportedError, match="of the kind TRTLLM_MHA; cpattn knows how fa3 and fa4 call"):
            ours.run_attention(q, forward_batch, "cpu", attend, SimpleNamespace(name="TRTLLM_MHA"))
        return ours.gather_hidden_states(first, forward_batch), pages

    prefix = torch.cat([cached[:, 1, :3], cached[:, 5, :2]], dim=1)
    expected, lse = oracle_attention(x[:, :2], x[:, 2:3], x[:, 3:], batch, prefix_k=prefix[0], prefix_v=prefix[1], scale=0.5)
    for out, pages in run_loopback(program, size=2):
        assert relative_rmse(out, expected) <= rmse_bound(0.0, torch.float32, 2, lse)
        assert torch.equal(pages[:, 4, 0], torch.stack([x[9, 2:3], x[9, 3:]]))


def test_what_a_layer_leaves_is_written_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Should a layer hand over keys and not attend, the pool writes them before anything else happens."""
    here = threading.local()
    monkeypatch.setattr(engine, "cp_group", lambda: here.transport)
    monkeypatch.setattr(engine, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(engine, "set_kv", lambda *given: here.written.append(given[1:]))
    layers = [SimpleNamespace(tp_k_head_num=2), SimpleNamespace(tp_k_head_num=2)]
    x = torch.randn(9, 4, 8)

    def program(transport: Any) -> list[Any]:
        here.transport, here.written = transport, []
        ours = strategy(transport.size, transport.rank)
        forward_batch = SimpleNamespace(attn_cp_metadata=ours.build_metadata(9, [8, 3], [8, 1]))
        for layer in layers:
            k, v = ours.shard_hidden_states(x, forward_batch).tensor_split(2, dim=1)
            ours.materialize_full_kv(forward_batch, layer, k.flatten(1), v.flatten(1), None)
        ours.gather_hidden_states(k, forward_batch)
        ours.gather_hidden_states(k, forward_batch)
        return list(here.written)

    for written in run_loopback(program, size=2):
        assert [layer for layer, *_ in written] == layers
        for _, k, v, swa_loc in written:
            assert torch.equal(torch.cat([k, v], dim=1), x)
            assert swa_loc is None


def modules_of(change: str = "") -> Modules:
    """Stand-ins for SGLang's modules, as the table of the interface has them, with a change."""
    methods = {name: f"def {name}(self, {taken.replace(' ', ', ')}): ..." for name, taken in STRATEGY.items() if taken is not None}
    fields = {name: f"{name}: object = None" for name in FIELDS}
    calls: dict[str, str] = {}
    for path, taken in CALLS.items():
        owner, name = path.split(".")
        calls[owner] = calls.get(owner, f"class {owner}:\n") + f"    def {name}(self, {taken.replace(' ', ', ')}): ...\n"
    if change == "a method less":
        del methods["gather_kv_cache"]
    elif change == "a method more":
        methods["shard_images"] = "def shard_images(self): ..."
    elif change == "another argument":
        methods["run_attention"] = methods["run_attention"].replace("device, ", "")
    elif change == "a field more":
        fields["rank_order"] = "rank_order: object = None"
    elif change == "another call":
        calls["KVWriteLoc"] = calls["KVWriteLoc"].replace("full_loc", "whole_loc")
    elif change == "a class less":
        del calls["KVWriteLoc"]
    values = [f"{name} = 1" for name, taken in STRATEGY.items() if taken is None]
    source = "\n".join(["class ZigzagCPStrategy:", *(f"    {line}" for line in [*methods.values(), *values])])
    source += "\n".join(["\n@dataclass\nclass ZigzagContextParallelMetadata:", *(f"    {line}" for line in fields.values())])
    zigzag: dict[str, Any] = {"dataclass": dataclasses.dataclass}
    exec(source, zigzag)
    if change == "no metadata":
        del zigzag["ZigzagContextParallelMetadata"]
    elif change == "other metadata":
        zigzag["ZigzagContextParallelMetadata"] = dict
    pools: dict[str, Any] = {}
    exec("\n".join(calls.values()), pools)
    context = SimpleNamespace() if change == "no backends" else SimpleNamespace(attention_backends=lambda: ("fa3", "fa3"))
    registered: list[Any] = []
    registry = SimpleNamespace(register=lambda *given: registered.append(given), registered=registered)
    hooks = SimpleNamespace(HookRegistry=registry, HookType=SimpleNamespace(REPLACE="replace"))
    return Modules(SimpleNamespace(**zigzag), SimpleNamespace(**pools), context, hooks)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ("a method less", "ZigzagCPStrategy has no gather_kv_cache"),
        ("a method more", "ZigzagCPStrategy has shard_images, which is new"),
        (
            "another argument",
            r"ZigzagCPStrategy.run_attention takes \(q forward_batch attn_fn attention_backend\), not \(q forward_batch device",
        ),
        ("a field more", "ZigzagContextParallelMetadata has the field rank_order"),
        ("another call", r"KVWriteLoc.for_batch takes \(forward_batch swa_loc whole_loc\), not"),
        ("a class less", "there is no KVWriteLoc"),
        ("no metadata", "there is no dataclass ZigzagContextParallelMetadata"),
        ("other metadata", "there is no dataclass ZigzagContextParallelMetadata"),
        ("no backends", "there is no attention_backends"),
    ],
)
def test_another_interface_is_refused_in_one_line(change: str, difference: str) -> None:
    check_interface(modules_of(), release="0.5.23")
    with pytest.raises(UnsupportedError, match=rf"in this one \(0\.5\.99\) {difference}.*SGLang's own strategy stays") as refused:
        check_interface(modules_of(change), release="0.5.99")
    assert "\n" not in str(refused.value)


def stand_in(monkeypatch: pytest.MonkeyPatch, modules: Modules | None) -> None:
    """SGLang 0.5.99 for a test: with these modules, or with none of them where it was."""
    monkeypatch.setitem(sys.modules, "sglang", ModuleType("sglang"))
    sys.modules["sglang"].__version__ = "0.5.99"  # type: ignore[attr-defined]
    if modules is not None:
        names = ("layers.cp.zigzag", "mem_cache.memory_pool", "runtime_context", "plugins.hook_registry")
        for name, module in zip(names, modules, strict=True):
            monkeypatch.setitem(sys.modules, f"sglang.srt.{name}", module)
            for n in range(name.count(".") + 1):
                package = f"sglang.srt.{name}".rsplit(".", n + 1)[0]
                monkeypatch.setitem(sys.modules, package, ModuleType(package))


def test_another_release_is_one_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for modules, why in (
        (
            None,
            r"UnsupportedError: .*\(0\.5\.99\) a module cannot be imported \(ModuleNotFoundError: No module named 'sglang.srt",
        ),
        (modules_of("no metadata"), r"UnsupportedError: .*\(0.5.99\) there is no dataclass ZigzagContextParallelMetadata"),
        (modules_of()._replace(zigzag=SimpleNamespace(ZigzagCPStrategy=3)), r"UnsupportedError: .*ZigzagCPStrategy has"),
    ):
        with monkeypatch.context() as patch:
            stand_in(patch, modules)
            caplog.clear()
            plugin()
            with pytest.raises(UnsupportedError, match=r"SGLang's own strategy stays"):
                replace_zigzag()
        (line,) = caplog.records
        assert (line.levelno, line.exc_info) == (logging.WARNING, None)
        message = line.getMessage()
        assert re.match(rf"cpattn is not in the place of the zigzag strategy of SGLang 0\.5\.99: {why}", message)
        assert "\n" not in message


def test_whatever_is_raised_is_one_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    modules = modules_of()
    modules.hook_registry.HookRegistry.register = None
    stand_in(monkeypatch, modules)
    plugin()
    (line,) = caplog.records
    assert "SGLang 0.5.99: TypeError: 'NoneType' object is not callable" in line.getMessage()


class OwnZigzag:
    """In the place of SGLang's class."""

    def __init__(self, cp_size: int) -> None:
        self.cp_size = cp_size


@pytest.mark.parametrize(
    ("backend", "is_ours", "says"),
    [
        ("fa3", True, "cpattn is in the place of the zigzag strategy of SGLang 0.5.99"),
        ("fa4", True, "cpattn is in the place of the zigzag strategy of SGLang 0.5.99"),
        (
            "trtllm_mha",
            False,
            "SGLang's own zigzag strategy stays, as cpattn serves the prefill backends fa3 and fa4, and this",
        ),
        (None, True, None),
    ],
)
def test_the_strategy_stays_sglangs_for_other_backends(
    backend: str | None, is_ours: bool, says: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def attention_backends() -> tuple[str, str]:
        if backend is None:
            raise ValueError("config namespace 'exec' not published")
        return backend, "trtllm_mha"

    modules = modules_of()._replace(runtime_context=SimpleNamespace(attention_backends=attention_backends))
    stand_in(monkeypatch, modules)
    plugin()
    ((target, made, _),) = modules.hook_registry.HookRegistry.registered
    assert target == "sglang.srt.layers.cp.zigzag.ZigzagCPStrategy"
    assert issubclass(made, modules.zigzag.ZigzagCPStrategy)
    made = strategy_over(OwnZigzag)
    assert not caplog.records
    strategy = made(cp_size=4)
    assert strategy.cp_size == 4
    assert isinstance(strategy, OwnZigzag)
    assert isinstance(strategy, CPAttnStrategy) is is_ours
    assert [line.getMessage()[: len(says or "")] for line in caplog.records] == [says] * (says is not None)
    assert all(line.levelno == logging.WARNING for line in caplog.records)


def test_every_method_that_is_answered_is_one_of_sglangs() -> None:
    answered = {name for name in vars(CPAttnStrategy) if not name.startswith("_")}
    assert answered <= set(STRATEGY)
    assert interface.KNOWN_RELEASE in (Path(__file__).parents[2] / "Makefile").read_text()


def test_sglang_finds_the_plugin_by_its_entry_point() -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    found = re.search(r'entry-points."sglang.srt.plugins"\]\ncpattn = "(.+):(.+)"', project)
    assert found is not None
    module, name = found.groups()
    assert getattr(importlib.import_module(module), name) is plugin
