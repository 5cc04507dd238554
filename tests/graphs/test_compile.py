"""Under torch.compile models become one graph, and what has no operator leaves it by itself: the same results, for batches of any
size, from a few compiled graphs."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from programs.compiled_model import CountingBackend, new_model, run_batches
from torch import Tensor
from torch.utils._pytree import tree_leaves

import cpattn
from cpattn import graphs
from cpattn.testing import run_loopback


@pytest.fixture(autouse=True)
def _forget_compiled_code() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def check(outputs: list[tuple[Tensor, Tensor]]) -> None:
    for compiled, plain in outputs:
        torch.testing.assert_close(compiled, plain)


# Whole graphs over processes and of every kind of cache are tested in test_whole_graphs.py.
@pytest.mark.parametrize(("cp_size", "dynamic"), [(1, False), (2, None), (2, True)], ids=["static", "default", "dynamic"])
def test_a_model_over_several_batches(cp_size: int, dynamic: bool | None) -> None:
    plain, backend = new_model(), CountingBackend()
    compiled = torch.compile(plain, backend=backend, dynamic=dynamic, fullgraph=dynamic is not False)
    for outputs in run_loopback(lambda group: run_batches(plain, compiled, group, cp_size, group.rank), cp_size):
        check(outputs)
    if dynamic is False:
        return  # torch compiles anew for each size, which is what this asks for
    # A size of 1 has graphs of its own; by default so has the first batch of each rank, before torch knows what changes.
    assert 1 <= backend.graphs <= (2 if dynamic else 4)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's own backend for CPUs needs a C++ compiler")
def test_torchs_own_backend() -> None:
    plain = new_model()
    for compiled, expected in run_batches(plain, torch.compile(plain, dynamic=True), None, 1, 0):
        torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-5)


def test_a_compiled_function_under_autograd_and_autocast_modes() -> None:
    meta = cpattn.build_metadata([(0, 7)], 1, 0)
    q = torch.randn(7, 2, 8)

    def attend(q: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return cpattn.cp_attention(q * 2, q, q, meta) + 1

    compiled = torch.compile(attend, backend=CountingBackend())
    torch.testing.assert_close(compiled(q), attend(q))


PAGES = torch.randn(8, 4, 2, 8)
TABLE = torch.tensor([[1, 2, 3], [5, 6, 7]])
PLAN = cpattn.plan([(0, 6), (3, 5)], 1)


def _paged() -> cpattn.PagedKV:
    return cpattn.PagedKV(PAGES.clone(), PAGES.clone(), TABLE)


def _with_pieces(x: Tensor) -> Any:
    meta, cache = PLAN.metadata(0), _paged()
    k, v = cpattn.gather_kv(x * 2, x, meta)
    cpattn.write_kv(k, v, cache, cpattn.slot_mapping(meta, TABLE, 4))
    return cpattn.attend(x, cache, meta, return_lse=True)


def _with_pages(x: Tensor) -> Any:
    cache = _paged()
    return cpattn.cp_attention(x + 1, x, x, PLAN.metadata(0), kv_cache=cache, return_lse=True), cache.k_pages, cache.page_size


def _with_a_packed_prefix(x: Tensor) -> Any:
    return cpattn.cp_attention(x, x, x, PLAN.metadata(0), kv_cache=cpattn.PackedKV(x[:3] + 1, x[:3]))


def _with_a_pool(x: Tensor) -> Any:
    pool = cpattn.KVPool(8, 4, 1, kv_heads=2, head_dim=8)
    pool.admit("a")
    meta = pool.plan([("a", 11)]).metadata(0)
    cache = pool.layer(0, pool.page_table(["a"]))
    return cpattn.cp_attention(x, x, x, meta, kv_cache=cache), pool.free_pages, pool.length("a"), cache.k_pages.sum() + 1


def _with_a_bucket(x: Tensor) -> Any:
    meta = cpattn.plan([(0, 6)], 1).metadata(0, bucket=cpattn.Bucket(max_requests=4, max_rows=16, max_chunks=8))
    meta.copy_(cpattn.plan([(0, 7)], 1))
    return meta.position_ids + 1, PLAN.fits(cpattn.Bucket(max_requests=4, max_rows=16, max_chunks=8)), cpattn.required_rows([(0, 9)], 2)


def _with_explanations(x: Tensor) -> Any:
    meta = cpattn.build_metadata([(0, 11)], 1, 0)
    cpattn.release()
    return cpattn.explain(x, x, x, meta)["cpu"], meta.plan.summary(), repr(meta), x + meta.rows


def _with_tables(x: Tensor) -> Any:
    meta = cpattn.build_metadata([(3, 5), (0, 6)], 1, 0)
    return meta.position_ids * 2, meta.token_index + 1, meta.restore_index + 1, meta.plan.num_tokens, x[: meta.num_tokens] + 1


def _refused(x: Tensor) -> Any:
    try:
        return cpattn.cp_attention(x, x[1:], x, cpattn.build_metadata([(0, 11)], 1, 0))
    except cpattn.RowCountError as error:
        return str(error), x + 1


@pytest.mark.parametrize(
    "function",
    [_with_pieces, _with_pages, _with_a_packed_prefix, _with_a_pool, _with_a_bucket, _with_explanations, _with_tables, _refused],
    ids=lambda function: function.__name__.strip("_"),
)
def test_whatever_is_called_in_a_compiled_function(function: Callable[[Tensor], Any]) -> None:
    x = torch.randn(11, 2, 8)
    expected = function(x)
    compiled = torch.compile(function, backend=CountingBackend())
    for _ in range(2):
        for got, wanted in zip(tree_leaves(compiled(x)), tree_leaves(expected), strict=True):
            assert torch.equal(got, wanted) if isinstance(wanted, Tensor) else got == wanted


KERNEL = cpattn.custom_backend(lambda q, k, v, rows, **options: (q.new_zeros(q.shape), q.new_zeros(q.shape[:2])))


WITH_GRADIENT = torch.randn(7, 2, 8, requires_grad=True)


@pytest.mark.parametrize(
    "call",
    [
        lambda x, meta: cpattn.gather_kv(x, x, meta)[0],
        lambda x, meta: cpattn.cp_attention(x, x, x, meta, backend=KERNEL),
        lambda x, meta: cpattn.cp_attention(WITH_GRADIENT, x, x, meta),
        lambda x, meta: cpattn.cp_attention(x, x, x, cpattn.build_metadata([(0, 7)], 1, 0)),
        lambda x, meta: cpattn.cp_attention(x, x, x, meta, kv_cache=cpattn.PagedKV(x[None], x[None], TABLE)),
        lambda x, meta: x[meta.extend_key_rows],
    ],
    ids=["gather_kv", "own_kernel", "gradients", "metadata", "pages_of_the_graph", "another_table"],
)
def test_a_whole_graph_is_refused_with_the_reason(call: Callable[[Tensor, cpattn.CPMetadata], Tensor]) -> None:
    meta, x = cpattn.build_metadata([(0, 7)], 1, 0), torch.randn(7, 2, 8)
    compiled = torch.compile(lambda x: call(x, meta), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"cpattn runs outside of graphs.*compile without fullgraph=True"):
        compiled(x)


def test_marks_add_nothing_to_a_call() -> None:
    assert graphs.marks_are_known
    for function in (cpattn.cp_attention, cpattn.shard, cpattn.unshard, cpattn.attend):
        assert not hasattr(function, "__wrapped__")
        assert function.__code__.co_name == function.__name__


def test_another_torch_whose_marks_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "marks_are_known", False)

    @graphs.leaves_graph
    def outside(x: Tensor) -> Tensor:
        assert not torch.compiler.is_compiling()
        return x + 1

    @graphs.has_operator
    def also_outside(x: Tensor) -> Tensor:
        assert not torch.compiler.is_dynamo_compiling()
        return x

    with pytest.raises(Exception, match="cpattn runs outside of graphs"):
        torch.compile(lambda x: also_outside(x), backend="eager", fullgraph=True)(torch.ones(1))
    backend = CountingBackend()
    assert torch.compile(lambda x: outside(x * 2) * 3, backend=backend)(torch.ones(1)).item() == 9
    assert backend.graphs == 2
