"""What a compiled graph calls: each operator by itself, its errors, the forward context, and export."""

from __future__ import annotations

import importlib.util
import io
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.library import opcheck

import cpattn
from cpattn import handles, ops
from cpattn.call import attention as call_attention
from cpattn.call import in_graph as call_in_graph
from cpattn.testing import run_loopback

META = cpattn.build_metadata([(5, 13), (17, 6)], 1, 0)
META_ALONE = cpattn.build_metadata([(0, 13), (0, 6)], 1, 0)
ALONE = cpattn.LoopbackGroup(1).transport(0)
TABLE = torch.arange(56, dtype=torch.int32).view(4, 14)


@pytest.fixture(autouse=True)
def _forget_compiled_code() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def pages() -> tuple[Tensor, Tensor]:
    both = rows(2, 56, 4, 2, 16)
    return both[0], both[1]


Q, K = rows(19, 4, 16), rows(19, 2, 16)
CACHE, NARROW = cpattn.PagedKV(*pages(), TABLE), cpattn.PagedKV(*pages(), TABLE[:, :2])
LATENT = cpattn.PackedKV(rows(22, 2, 16), None)
FIXED = cpattn.build_metadata([(0, 7)], 1, 0)


def _samples() -> dict[str, tuple[str, tuple[Any, ...]]]:
    own, packed = pages(), rows(22, 2, 16)
    call = Q, K, K, META.handle, ops.ORDER, ALONE.handle
    reads = Q, META.handle, ops.ORDER, ALONE.handle
    write = K, K, torch.arange(19), False, ops.ORDER
    # What operators write to is given as clones.
    out, cache = torch.empty(19, 4, 16), (*CACHE.written, TABLE, CACHE.handle)
    return {
        "pages": ("attention.paged", (*call, "window=5;return_lse=True", rows(4), None, *cache)),
        "out": ("attention.paged", (*call, "", None, out, *cache)),
        "latent": ("attention.packed", (Q, K, None, META.handle, ops.ORDER, None, "v_dim=8", None, None, LATENT.k, LATENT.v)),
        "no_cache": ("attention", (Q, K, K, META_ALONE.handle, ops.ORDER, ALONE.handle, "", None, None)),
        "given_pages": ("attention.paged", (*call, "scale=0.5", None, None, *own, TABLE, None)),
        "given_packed": ("attention.packed", (*call, "", None, None, packed, packed)),
        "attend": ("attend", (*reads, "softcap=3.0;return_lse=True", None, None, *cache, 16)),
        "attend_out": ("attend", (*reads, "", None, out, *cache, 16)),
        "attend_given_pages": ("attend", (*reads, "", None, None, *own, TABLE, None, 16)),
        "write": ("write", (*write, *CACHE.written, CACHE.handle)),
        "write_given_pages": ("write", (*write, *own, None)),
        "shard": ("shard", (Q, META.handle, 19, 0)),
        "shard_along_another_axis": ("shard", (Q.movedim(0, 1), META.handle, 19, 1)),
        "unshard": ("unshard", (Q, META.handle, ops.ORDER, ALONE.handle, 19, "check=True")),
        "positions": ("table", (META.handle, "position_ids", 19, torch.device("cpu"))),
        "restore": ("table", (META.handle, "restore_index", 19, torch.device("cpu"))),
    }


@pytest.mark.parametrize("sample", _samples())
def test_opcheck(sample: str) -> None:
    name, arguments = _samples()[sample]
    packet, _, overload = name.partition(".")
    results = opcheck(getattr(getattr(torch.ops.cpattn, packet), overload or "default"), arguments)
    assert set(results.values()) == {"SUCCESS"}


def test_every_operator_is_checked() -> None:
    # That of masks with the models of transformers.
    assert {name for name, _ in _samples().values()} == set(ops.SCHEMAS) - {"token_mask"}


def test_a_sharded_batch_comes_back() -> None:
    def run(group: cpattn.Transport) -> None:
        meta, x = cpattn.build_metadata([(0, 7), (0, 2)], 3, group.rank), rows(9, 4)
        local = torch.ops.cpattn.shard(x, meta.handle, meta.rows, 0)
        assert torch.equal(local, cpattn.shard(x, meta))
        assert torch.equal(torch.ops.cpattn.unshard(local, meta.handle, ops.ORDER, group.handle, 9, ""), x)

    run_loopback(run, 3)


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch's own backend for CPUs needs a C++ compiler")


def whole(function: Callable[..., Any], backend: str = "eager") -> Callable[..., Any]:
    """One graph. As ``aot_eager`` makes it, it knows only what is declared to be written, and leaves out what nobody needs."""
    return torch.compile(function, backend=backend, fullgraph=True)


def test_pieces_in_one_graph() -> None:
    slots = torch.arange(60, 79)

    @torch.no_grad()
    def pieces(cache: cpattn.PagedKV) -> tuple[Tensor, Tensor, Tensor]:
        cpattn.write_kv(K, K, cache, slots)
        out = torch.empty(19, 4, 16)
        result = cpattn.attend(Q, cache, META, out=out)
        other, lse = cpattn.attend(Q, cache, META, window=4, return_lse=True)
        return result + out, other, lse

    mine, theirs = (cpattn.PagedKV(*pages(), TABLE) for _ in range(2))
    for got, expected in zip(whole(pieces, "aot_eager")(mine), pieces(theirs), strict=True):
        assert torch.equal(got, expected)
    assert torch.equal(mine.k_pages, theirs.k_pages)
    assert not torch.equal(mine.k_pages, pages()[0])


def test_a_striped_cache_in_one_graph() -> None:
    """The operators know the owner rule by the metadata, and the group of ``attend`` as that of ``cp_attention``."""
    plan = cpattn.plan([(9, 4), (6, 7)], 2, owner=cpattn.Striped(2))
    table = torch.arange(8, dtype=torch.int32).view(2, 4)

    @torch.no_grad()
    def calls(q: Tensor, k: Tensor, cache: cpattn.PagedKV, meta: cpattn.CPMetadata, group: cpattn.Transport) -> tuple[Tensor, ...]:
        result, lse = cpattn.cp_attention(q, k, k, meta, group=group, kv_cache=cache, return_lse=True)
        near = cpattn.cp_attention(q, k, k, meta, group=group, kv_cache=cache, window=5)
        return result, lse, near, cpattn.attend(q, cache, meta, group=group), cpattn.attend(q, cache, None)

    compiled = whole(calls, "aot_eager")

    def run(group: cpattn.Transport) -> None:
        meta = plan.metadata(group.rank)
        q, k = (cpattn.shard(x, meta) for x in (rows(11, 4, 16), rows(11, 2, 16)))
        mine, theirs = (cpattn.PagedKV(*pages(), table) for _ in range(2))
        with cpattn.forward_context(meta, group=group):
            got, expected = compiled(q, k, mine, meta, group), calls(q, k, theirs, meta, group)
        for one, other in zip(got, expected, strict=True):
            assert torch.equal(one, other)
        assert torch.equal(mine.k_pages, theirs.k_pages)
        assert not torch.equal(mine.k_pages, pages()[0])
        result, _, near, *held = expected
        assert not torch.equal(near, result)
        for again in held:
            torch.testing.assert_close(again, result)

    run_loopback(run, 2)


def _two_calls(x: Tensor) -> Tensor:
    """Nobody needs the result of the first."""
    cpattn.cp_attention(x, x, x, None)
    return cpattn.cp_attention(x * 2, x, x, None)


def _calls_in_a_graph() -> int:
    x = rows(19, 2, 16)
    with cpattn.forward_context(META_ALONE) as context, torch.no_grad():
        result = whole(_two_calls, "aot_eager")(x)
        calls = context.calls
        assert torch.equal(result, _two_calls(x))
    return calls


def test_a_call_that_nobody_needs_stays_in_the_graph() -> None:
    """Another rank, whose graph needs it, waits for it."""
    assert _calls_in_a_graph() == 2


def test_calls_stay_by_their_order_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_in_graph, "order", lambda: None)
    assert _calls_in_a_graph() == 1


def test_options_that_compilers_have_as_symbols() -> None:
    """Numbers that a function is given are symbols to it. Each value has a graph of its own."""
    compiled = torch.compile(
        lambda window, scale: cpattn.cp_attention(Q, K, K, META, kv_cache=CACHE, window=window, scale=scale),
        backend="eager",
        fullgraph=True,
        dynamic=True,
    )
    for window, scale in ((3, 0.1), (5, 0.1), (5, 2.5)):
        assert torch.equal(compiled(window, scale), cpattn.cp_attention(Q, K, K, META, kv_cache=CACHE, window=window, scale=scale))


@pytest.mark.parametrize(
    "options",
    [{}, {"scale": float("inf"), "window": -3, "check": True}, {"label": "a=b;\n %3B\r'\\", "group_name": "0", "softcap": 0.1, "scale": 2}],
    ids=["none", "odd", "text"],
)
def test_options_come_back(options: dict[str, Any]) -> None:
    text = ops.options_text(options)
    assert ops.parse_options(text) == ops.Options(**options)
    # Compilers write it into comments.
    assert len(text.splitlines()) <= 1


def test_checked_calls_with_labels() -> None:
    meta = cpattn.build_metadata([(0, 7)], 1, 0)

    def call(x: Tensor) -> Tensor:
        out = cpattn.cp_attention(
            x, x, x, meta, check=True, label="layer 1", scale=1, window=3, overlap=1, strategy="ring", backend="reference"
        )
        return cpattn.unshard(out, meta, check=True, label="output")

    x = rows(7, 2, 16)
    assert torch.equal(whole(call)(x), call(x))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: cpattn.cp_attention(Q[:9], K[:9], K[:9], META), cpattn.RowCountError, "q has 9 rows"),
        (lambda: cpattn.cp_attention(Q, K, K, META), cpattn.PrefixError, "the batch has 22 prefix tokens, but kv_cache is None"),
        (lambda: cpattn.cp_attention(Q, K, K, META, kv_cache=CACHE, window=-1), cpattn.OptionError, "window=-1"),
        (lambda: cpattn.cp_attention(Q, K, K, META, kv_cache=CACHE, strategy="spiral"), cpattn.UnknownNameError, "spiral"),
        (lambda: cpattn.cp_attention(Q[0], K, K, META), cpattn.TensorMismatchError, "q has shape"),
        (lambda: cpattn.cp_attention(Q, K, K, META, kv_cache=CACHE, out=Q[:, :2].clone()), cpattn.TensorMismatchError, "out"),
        (lambda: cpattn.cp_attention(Q, K, torch.tensor(1.0), META), cpattn.TensorMismatchError, "v has shape"),
        (lambda: cpattn.cp_attention(Q, torch.tensor(1.0), K, META), cpattn.TensorMismatchError, "k has shape"),
        (lambda: cpattn.cp_attention(Q, K, K, META, kv_cache=CACHE, v_dim=-5), cpattn.TensorMismatchError, "v_dim=-5"),
        (lambda: cpattn.shard(Q, META, dim=5), cpattn.OptionError, "dim=5"),
        (lambda: cpattn.cp_attention(Q, K, K, None), cpattn.CPError, "there is no forward_context here"),
        (lambda: cpattn.shard(Q[:9], META), cpattn.RowCountError, "the batch has 19 new tokens"),
        (lambda: cpattn.unshard(Q[:9], META), cpattn.RowCountError, "x has 9 rows"),
        (lambda: cpattn.attend(Q, NARROW, META), cpattn.PageTableError, "page_table"),
        (lambda: cpattn.write_kv(K, K, CACHE, torch.zeros(19).long()), cpattn.PageTableError, "slot"),
    ],
    ids=[
        "rows",
        "prefix",
        "window",
        "strategy",
        "axes",
        "out",
        "no_axis_v",
        "no_axis_k",
        "v_dim",
        "dim",
        "context",
        "shard",
        "unshard",
        "attend",
        "write",
    ],
)
def test_errors_of_a_graph_are_those_of_the_call(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as plain:
        call()
    with pytest.raises(error, match=message) as compiled, torch.no_grad():
        whole(call)()
    assert str(compiled.value) == str(plain.value)
    assert type(compiled.value) is error


@pytest.mark.parametrize("missing", ["q", "k"])
def test_cp_attention_in_a_graph_is_not_attend(missing: str) -> None:
    """Without k it is refused, as outside of a graph, where the graph ends for it."""

    def call() -> Tensor:
        q, k = (None, K) if missing == "q" else (Q, None)
        return cpattn.cp_attention(q, k, None, META, kv_cache=CACHE)  # type: ignore[arg-type]

    with pytest.raises(cpattn.CPError, match=f"{missing} is a NoneType") as plain:
        call()
    with pytest.raises(cpattn.CPError) as compiled, torch.no_grad():
        torch.compile(call, backend="eager")()
    assert str(compiled.value) == str(plain.value)


def test_a_pools_table_is_checked_in_a_graph_too() -> None:
    pool = cpattn.KVPool(16, 4, 1, kv_heads=2, head_dim=16)
    pool.admit("a")
    pool.plan([("a", 11)])
    cache = pool.layer(0, pool.page_table(["a"]))
    meta, x, k = cpattn.plan([(20, 3)], 1).metadata(0), rows(3, 4, 16), rows(3, 2, 16)

    def call(x: Tensor) -> Tensor:
        return cpattn.cp_attention(x, k, k, meta, kv_cache=cache)

    with pytest.raises(cpattn.CPError) as plain:
        call(x)
    with pytest.raises(cpattn.CPError) as compiled:
        whole(call)(x)
    assert str(plain.value) == str(compiled.value)


# Pages, which a graph writes, and itself reads and writes besides.


def _own_tensors() -> tuple[Tensor, Tensor]:
    """Those of one layer, as of an engine that has the keys of all layers in one, and the values in another."""
    return rows(2, 56, 4, 2, 16)[1], rows(3, 56, 4, 2, 16)[2]


def _interleaved() -> tuple[Tensor, Tensor]:
    both = rows(56, 2, 4, 2, 16)
    return both[:, 0], both[:, 1]


def _reads_and_writes(cache: cpattn.PagedKV) -> tuple[Tensor, ...]:
    """Each result is used after the next call: what a compiler may hold back it would read too late."""
    assert cache.v_pages is not None
    slots = torch.arange(19) * 3
    before, of_v = cache.k_pages[:8] + 1, cache.v_pages[3] * 2
    cpattn.write_kv(K, K + 1, cache, slots)
    between = before * 2, cache.v_pages[:9] + 1
    cache.k_pages.flatten(0, 1)[slots[:5]] = K[:5] - 1
    cache.v_pages.mul_(0.5)
    attended = cpattn.attend(Q, cache, META)
    out = cpattn.cp_attention(Q, K, K, META, kv_cache=cache)
    after = cache.k_pages[1] * 2
    cache.k_pages.mul_(2)
    return *between, attended, out, of_v + out.sum(), after - cache.k_pages[1]


@pytest.mark.parametrize(
    ("backend", "layout", "dynamic"),
    [
        ("aot_eager", pages, None),
        *(("aot_eager", layout, True) for layout in (_own_tensors, pages, _interleaved)),
        # These take seconds each.
        pytest.param("inductor", pages, None, marks=needs_compiler),
        pytest.param("inductor", _own_tensors, True, marks=needs_compiler),
    ],
)
def test_a_graph_that_itself_reads_and_writes_pages(
    backend: str, layout: Callable[[], tuple[Tensor, Tensor]], dynamic: bool | None
) -> None:
    mine, theirs = (cpattn.PagedKV(*layout(), TABLE) for _ in range(2))
    with torch.no_grad():
        got = torch.compile(_reads_and_writes, backend=backend, fullgraph=True, dynamic=dynamic)(mine)
        expected = _reads_and_writes(theirs)
    for one, other in zip([*got, mine.k_pages, mine.v_pages], [*expected, theirs.k_pages, theirs.v_pages], strict=True):
        torch.testing.assert_close(one, other)


def _all_of_one_tensor() -> list[tuple[Tensor, Tensor]]:
    """Of both layers, K and V; of inference mode, where no view knows what it is one of."""
    with torch.inference_mode():
        return [(layer[0], layer[1]) for layer in rows(2, 2, 56, 4, 2, 16)]


@needs_compiler
@pytest.mark.parametrize(
    ("layers_pages", "dynamic"),
    [
        (_all_of_one_tensor, None),
        (_all_of_one_tensor, True),
        (lambda: [_own_tensors(), _own_tensors()], True),
        (lambda: [_interleaved(), _interleaved()], True),
    ],
    ids=["one_tensor", "one_tensor_dynamic", "own_tensors_dynamic", "interleaved_dynamic"],
)
def test_a_graph_writes_to_the_engines_own_pages(
    layers_pages: Callable[[], list[tuple[Tensor, Tensor]]], dynamic: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No compiler copies them, as long as a graph does no more than a model does."""
    written: list[tuple[int, ...]] = []

    def call(arguments: Any, *more: Any, **options: Any) -> Any:
        written.append((arguments.kv_cache.k_pages.data_ptr(), arguments.kv_cache.v_pages.data_ptr()))
        return run_attention(arguments, *more, **options)

    def layers(x: Tensor, caches: list[cpattn.PagedKV]) -> Tensor:
        for cache in caches:
            x = x + cpattn.cp_attention(x, K, K, META, kv_cache=cache) + cpattn.attend(x, cache, META)
        return x

    run_attention = call_attention.run_attention
    monkeypatch.setattr(call_attention, "run_attention", call)
    mine, theirs = ([cpattn.PagedKV(k, v, TABLE) for k, v in layers_pages()] for _ in range(2))
    with torch.inference_mode():
        got = torch.compile(layers, fullgraph=True, dynamic=dynamic)(Q, mine)
        assert written == [tuple(pages.data_ptr() for pages in (cache.k_pages, cache.v_pages) if pages is not None) for cache in mine]
        torch.testing.assert_close(got, layers(Q, theirs))
    for one, other in zip(mine, theirs, strict=True):
        assert torch.equal(one.k_pages, other.k_pages)


# Handles.


def test_a_handle_does_not_keep_its_object() -> None:
    meta = cpattn.build_metadata([(0, 3)], 1, 0)
    handle, gone = meta.handle, weakref.ref(meta)
    assert handles.resolve(handle, cpattn.CPMetadata) is meta
    del meta
    assert gone() is None
    with pytest.raises(cpattn.CPError, match=r"a CPMetadata by the handle \d+, but this process has none of that number"):
        torch.ops.cpattn.shard(torch.zeros(3), handle, 3, 0)


def test_a_handle_is_of_one_kind() -> None:
    with pytest.raises(cpattn.CPError, match="refers to a CPMetadata"):
        handles.resolve(ALONE.handle, cpattn.CPMetadata)


def test_a_process_group_that_is_gone() -> None:
    """A graph has its name, which torch forgets with the group."""
    with pytest.raises(cpattn.GroupError, match="this process group has been destroyed"):
        torch.ops.cpattn.unshard(Q, META.handle, ops.ORDER, None, 19, "group_name=100")


def test_handles_of_another_process_are_none_here() -> None:
    """Each counts from a place of its own. A second copy of the module stands for it."""
    spec = importlib.util.spec_from_file_location("handles_of_another_process", handles.__file__)
    assert spec is not None
    assert spec.loader is not None
    other = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(other)
    handle = other.new_handle(META)
    assert other.resolve(handle, cpattn.CPMetadata) is META
    with pytest.raises(cpattn.CPError, match=f"by the handle {int(handle)}, but this process has none"):
        handles.resolve(handle, cpattn.CPMetadata)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="only some systems fork")
def test_a_forked_child_makes_handles_of_its_own() -> None:
    theirs, ours = os.pipe()
    child = os.fork()
    if not child:
        os.write(ours, int(handles.new_handle(META)).to_bytes(8, "little"))
        os._exit(0)
    os.waitpid(child, 0)
    number = int.from_bytes(os.read(theirs, 8), "little")
    assert abs(number - int(handles.new_handle(META))) > 10 * handles._MADE_AT_ONCE


def test_what_is_gone_is_forgotten() -> None:
    class Thing: ...

    for _ in range(10 * handles._look_again_at):
        handles.new_handle(Thing())
    alive = len([reference for reference in handles._objects.values() if reference() is not None])
    assert len(handles._objects) <= 2 * (alive + handles._MADE_AT_ONCE)


def test_a_cache_made_while_another_thread_exports_is_of_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    assert torch.compiler.is_compiling()
    cache = cpattn.PagedKV(*pages(), TABLE)
    assert not cache.is_of_graph
    assert cache.handle is not None
    assert handles.resolve(cache.handle, cpattn.PagedKV) is cache


class Loaded(nn.Parameter):
    """As engines have them, which know how to load themselves."""


def test_pages_of_a_class_of_parameters() -> None:
    def cache_here() -> cpattn.PagedKV:
        k, v = pages()
        return cpattn.PagedKV(Loaded(k, requires_grad=False), Loaded(v, requires_grad=False), TABLE)

    mine, theirs = cache_here(), cache_here()
    got = whole(lambda: cpattn.cp_attention(Q, K, K, META, kv_cache=mine))()
    assert torch.equal(got, cpattn.cp_attention(Q, K, K, META, kv_cache=theirs))
    assert torch.equal(mine.k_pages, theirs.k_pages)


def test_sinks_of_a_class_of_parameters() -> None:
    sinks = Loaded(rows(4), requires_grad=False)
    got = whole(lambda: cpattn.cp_attention(Q, K, K, META, kv_cache=CACHE, sinks=sinks))()
    assert torch.equal(got, cpattn.cp_attention(Q, K, K, META, kv_cache=CACHE, sinks=sinks))


# The forward context.


def test_a_forward_context() -> None:
    x, first, second = rows(7, 2, 16), cpattn.build_metadata([(0, 7)], 1, 0), cpattn.build_metadata([(0, 3), (0, 4)], 1, 0)
    compiled = whole(lambda x: cpattn.cp_attention(x, x, x, None))
    expected = [cpattn.cp_attention(x, x, x, meta) for meta in (first, second)]
    with cpattn.forward_context(first) as outer:
        assert torch.equal(compiled(x), expected[0])
        with cpattn.forward_context(second) as inner:
            assert torch.equal(compiled(x), expected[1])
            assert torch.equal(cpattn.cp_attention(x, x, x, None), expected[1])
        assert torch.equal(cpattn.cp_attention(x, x, x, None), expected[0])
    assert (outer.calls, inner.calls) == (2, 2)
    with pytest.raises(cpattn.CPError, match="meta is None, but there is no forward_context here"):
        cpattn.cp_attention(x, x, x, None)
    with pytest.raises(cpattn.CPError, match="meta is a int"), cpattn.forward_context(3):  # type: ignore[arg-type]
        pass


def test_a_forward_context_has_what_graphs_cannot_hold() -> None:
    x, meta, asked = rows(7, 2, 16), cpattn.build_metadata([(0, 7)], 1, 0), []

    def kernel(q: Tensor, k: Tensor, v: Tensor, rows: Any, **_: Any) -> tuple[Tensor, Tensor]:
        asked.append(len(q))
        return torch.ones_like(q), q.new_zeros(q.shape[:2])

    compiled = whole(lambda x, backend="auto": cpattn.cp_attention(x, x, x, None, backend=backend))
    with cpattn.forward_context(meta, backend=kernel, strategy="ring"):
        assert torch.equal(compiled(x), torch.ones_like(x))
        assert asked == [7]
        # What the call itself says holds.
        assert torch.equal(compiled(x, "cpu"), cpattn.cp_attention(x, x, x, meta, backend="cpu"))


def test_a_forward_context_of_each_rank() -> None:
    def run(group: cpattn.Transport) -> Tensor:
        plan, x = cpattn.plan([(0, 9)], 2), rows(9, 2, 16)
        meta = plan.metadata(group.rank)
        with cpattn.forward_context(meta, group=group, check=True):
            local = cpattn.shard(x, meta)
            return cpattn.unshard(compiled(local), meta, group=group)

    compiled = whole(lambda x: cpattn.cp_attention(x, x, x, None))
    x = rows(9, 2, 16)
    expected = cpattn.cp_attention(x, x, x, cpattn.build_metadata([(0, 9)], 1, 0))
    for out in run_loopback(run, 2):
        torch.testing.assert_close(out, expected)


# Export.


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(64, 8 * 16)

    def forward(self, x: Tensor, position_ids: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (-1, 16)) * (1.0 + position_ids % 2)[:, None, None]
        q, k, v = heads.split([4, 2, 2], dim=1)
        cache = cpattn.PagedKV(k_pages, v_pages, page_table)
        written: Tensor = cpattn.cp_attention(q, k, v, None, kv_cache=cache, window=9)
        return x + written.flatten(1) + cpattn.attend(q, cache, None).flatten(1)


def _inputs(meta: cpattn.CPMetadata) -> tuple[Tensor, ...]:
    return rows(meta.rows, 64), meta.position_ids, *pages(), TABLE


@pytest.mark.parametrize("strict", [False, True], ids=["not_strict", "strict"])
def test_an_exported_model_runs_any_batch(strict: bool) -> None:
    layer, any_rows = Layer(), torch.export.Dim("rows", max=4096)
    sizes = ({0: any_rows}, {0: any_rows}, None, None, None)
    with torch.no_grad():
        program = torch.export.export(layer, _inputs(META), dynamic_shapes=sizes, strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for batch in ([(5, 13), (17, 6)], [(0, 9), (3, 30), (8, 1)]):
        meta = cpattn.build_metadata(batch, 1, 0)
        mine, theirs = _inputs(meta), _inputs(meta)
        with cpattn.forward_context(meta), torch.no_grad():
            assert torch.equal(loaded(*mine), layer(*theirs))
        assert torch.equal(mine[2], theirs[2])
    with pytest.raises(cpattn.CPError, match="there is no forward_context here"), torch.no_grad():
        loaded(*mine)


def test_an_exported_program_needs_nothing_imported_but_the_context(tmp_path: Path) -> None:
    layer = Layer()
    with torch.no_grad():
        torch.export.save(torch.export.export(layer, _inputs(META)), tmp_path / "layer.pt2")
        with cpattn.forward_context(META):
            torch.save((_inputs(META), layer(*_inputs(META))), tmp_path / "expected.pt")
    code = """
import sys, torch, cpattn
torch.set_num_threads(1)  # as here: the bits of a product depend on how many there are
cpattn.forward_context
assert "cpattn.api" not in sys.modules and "cpattn.serving" not in sys.modules
program = torch.export.load("layer.pt2").module()
inputs, expected = torch.load("expected.pt")
with cpattn.forward_context(cpattn.build_metadata([(5, 13), (17, 6)], 1, 0)), torch.no_grad():
    assert torch.equal(program(*inputs), expected)
"""
    path = [str(Path(cpattn.__file__).parent.parent), *sys.path]
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("strict", [False, True], ids=["not_strict", "strict"])
@pytest.mark.parametrize(
    "call",
    [
        lambda x: cpattn.cp_attention(x, x, x, FIXED),
        lambda x: cpattn.shard(x, FIXED),
        lambda x: cpattn.unshard(x, FIXED),
        lambda x: cpattn.cp_attention(x, x, x, None, kv_cache=CACHE),
        lambda x: cpattn.attend(x, CACHE, None),
    ],
    ids=["cp_attention", "shard", "unshard", "cache", "attend"],
)
def test_a_batch_is_not_exported(call: Callable[[Tensor], Tensor], strict: bool) -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return call(x)

    with (
        pytest.raises(Exception, match="an exported program outlives the metadata of a batch, and its cache: pass meta=None"),
        torch.no_grad(),
    ):
        torch.export.export(Fixed(), (rows(7, 2, 16),), strict=strict)
