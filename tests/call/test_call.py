"""What is decided about a call serves further layers of the same layouts and options, and no others."""

from __future__ import annotations

from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor

import cpattn
from cpattn.attention.backend import AttentionOptions
from cpattn.call import find
from cpattn.call.arguments import Arguments
from cpattn.call.prepared import PreparedCall
from cpattn.testing import SoloCommunicator

Changes: TypeAlias = "dict[str, Any]"


def strided(x: Tensor) -> Tensor:
    """Of the same shape, with other strides but that of the last axis."""
    wide = x.new_empty(*x.shape[:-1], x.shape[-1] + 8)
    return wide[..., : x.shape[-1]].copy_(x)


def transposed(x: Tensor) -> Tensor:
    """Of the same shape, its last axis not contiguous."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def packed(*shape: int) -> cpattn.PackedKV:
    return cpattn.PackedKV(torch.randn(shape), torch.randn(shape))


def arguments(**changes: Any) -> Arguments:
    """New tensors each time."""
    given = {
        "q": torch.randn(14, 4, 16), "k": torch.randn(14, 2, 16), "v": torch.randn(14, 2, 16), "v_dim": None, "kv_cache": packed(3, 2, 16),
        "strategy": "ring", "backend": "auto", "overlap": None, "scale": None, "window": None, "softcap": None, "sinks": None,
        "out": None,
    }  # fmt: skip
    return Arguments(**given | changes)


def paged(k: Tensor | None = None, v: Tensor | None = None, table: Tensor | None = None) -> cpattn.PagedKV:
    pages = torch.randn(2, 4, 4, 2, 16)
    whole = torch.zeros(2, 5, dtype=torch.int32) if table is None else table
    return cpattn.PagedKV(pages[0] if k is None else k, pages[1] if v is None else v, whole)


def in_inference_mode(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


PAGES, TABLE = torch.randn(4, 4, 2, 16), torch.zeros(2, 5, dtype=torch.int32)
NEW, SINKS, CACHED = torch.randn(14, 2, 16), torch.randn(4), torch.randn(3, 2, 16)
OUT = torch.empty(14, 4, 16)
# What a call differs in from another that is as given on the left.
KEYS: dict[str, tuple[Changes, Changes]] = {
    "kind of q": ({}, {"q": torch.nn.Parameter(torch.randn(14, 4, 16), requires_grad=False)}),
    "kind of k": ({}, {"k": torch.nn.Parameter(NEW, requires_grad=False)}),
    "kind of v": ({}, {"v": torch.nn.Parameter(NEW, requires_grad=False)}),
    "kind of sinks": ({"sinks": SINKS}, {"sinks": torch.nn.Parameter(SINKS, requires_grad=False)}),
    "kind of pages": ({"kv_cache": paged()}, {"kv_cache": paged(k=torch.nn.Parameter(PAGES, requires_grad=False))}),
    "q shape": ({}, {"q": torch.randn(14, 4, 16)[:, :2]}),
    "q strides": ({}, {"q": strided(torch.randn(14, 4, 16))}),
    "q dtype": ({}, {"q": torch.randn(14, 4, 16).half()}),
    "q device": ({}, {"q": torch.empty(14, 4, 16, device="meta")}),
    "k shape": ({}, {"k": NEW[:, :1]}),
    "k strides": ({}, {"k": strided(NEW)}),
    "k dtype": ({}, {"k": NEW.half()}),
    "k device": ({}, {"k": NEW.to("meta")}),
    "no v": ({"v_dim": 16}, {"v": None}),
    "v shape": ({}, {"v": NEW[..., :8]}),
    "v strides": ({}, {"v": strided(NEW)}),
    "v dtype": ({}, {"v": NEW.half()}),
    "v device": ({}, {"v": NEW.to("meta")}),
    "sinks": ({}, {"sinks": SINKS}),
    "sinks shape": ({"sinks": SINKS}, {"sinks": SINKS[:2]}),
    "sinks strides": ({"sinks": SINKS}, {"sinks": torch.randn(8)[::2]}),
    "sinks dtype": ({"sinks": SINKS}, {"sinks": SINKS.half()}),
    "sinks device": ({"sinks": SINKS}, {"sinks": SINKS.to("meta")}),
    "out": ({}, {"out": OUT}),
    "out shape": ({"out": OUT}, {"out": OUT[:, :2]}),
    "out strides": ({"out": OUT}, {"out": strided(OUT)}),
    "out dtype": ({"out": OUT}, {"out": OUT.half()}),
    "out device": ({"out": OUT}, {"out": OUT.to("meta")}),
    "out of inference mode": ({"out": OUT}, {"out": in_inference_mode(OUT)}),
    "no cache": ({}, {"kv_cache": None}),
    "what is no cache": ({"kv_cache": None}, {"kv_cache": CACHED}),
    "kind of cache": ({}, {"kv_cache": paged()}),
    "cached k shape": ({}, {"kv_cache": cpattn.PackedKV(CACHED[:2], CACHED)}),
    "cached k strides": ({}, {"kv_cache": cpattn.PackedKV(strided(CACHED), CACHED)}),
    "no cached v": ({}, {"kv_cache": cpattn.PackedKV(CACHED, None)}),
    "cached v strides": ({}, {"kv_cache": cpattn.PackedKV(CACHED, strided(CACHED))}),
    "page size": ({"kv_cache": paged()}, {"kv_cache": paged(k=PAGES[:, :2])}),
    "k page strides": ({"kv_cache": paged()}, {"kv_cache": paged(k=strided(PAGES))}),
    "v page strides": ({"kv_cache": paged()}, {"kv_cache": paged(v=strided(PAGES))}),
    "k pages of inference mode": ({"kv_cache": paged()}, {"kv_cache": paged(k=in_inference_mode(PAGES))}),
    "v pages of inference mode": ({"kv_cache": paged()}, {"kv_cache": paged(v=in_inference_mode(PAGES))}),
    "page table shape": ({"kv_cache": paged()}, {"kv_cache": paged(table=TABLE[:1])}),
    "page table strides": ({"kv_cache": paged()}, {"kv_cache": paged(table=transposed(TABLE))}),
    "page table dtype": ({"kv_cache": paged()}, {"kv_cache": paged(table=TABLE.long())}),
    "v_dim": ({"v": None, "v_dim": 8}, {"v_dim": 16}),
    "strategy": ({}, {"strategy": "all_gather"}),
    "backend": ({}, {"backend": "reference"}),
    "overlap": ({"overlap": 1}, {"overlap": 2}),
    "scale": ({"scale": 0.5}, {"scale": 0.25}),
    "window": ({"window": 3}, {"window": 4}),
    "softcap": ({"softcap": 3.0}, {"softcap": 4.0}),
    "type of v_dim": ({"v": None, "v_dim": 1}, {"v_dim": True}),
    "type of overlap": ({"overlap": 1}, {"overlap": True}),
    "type of scale": ({"scale": 1}, {"scale": True}),
    "type of window": ({"window": 1}, {"window": True}),
    "type of softcap": ({"softcap": 1}, {"softcap": True}),
}


@pytest.mark.parametrize(("first", "second"), list(KEYS.values()), ids=list(KEYS))
def test_the_key_says_all_that_a_prepared_call_depends_on(first: Changes, second: Changes) -> None:
    assert arguments(**first).key() == arguments(**first).key()
    assert arguments(**first).key() != arguments(**first | second).key()


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[Arguments]:
    """The calls that were prepared anew."""
    found: list[Arguments] = []
    prepare = find.prepare_call

    def recorded(arguments: Arguments, *rest: Any) -> PreparedCall:
        found.append(arguments)
        return prepare(arguments, *rest)

    monkeypatch.setattr(find, "prepare_call", recorded)
    return found


PLAN = cpattn.plan([(3, 19), (0, 8)], 2, pad_to=14)
LAYERS: dict[str, Changes] = {
    "q strides": {"q": strided},
    "q transposed": {"q": transposed},
    "k transposed": {"k": transposed},
    "v transposed": {"v": transposed},
    "cache transposed": {"kv_cache": lambda cache: cpattn.PackedKV(transposed(cache.k), transposed(cache.v))},
    "narrower v": {"v": lambda v: v[..., :8], "kv_cache": lambda cache: cpattn.PackedKV(cache.k, cache.v[..., :8])},
    "scale": {"scale": lambda _: 0.5},
    "window": {"window": lambda _: 4},
    "softcap": {"softcap": lambda _: 2.0},
    "sinks": {"sinks": lambda _: torch.tensor([0.5, -1.0, 3.0, 0.0])},
}


@pytest.mark.parametrize("strategy", ["all_gather", "ring"])
@pytest.mark.parametrize("changes", list(LAYERS.values()), ids=list(LAYERS))
def test_a_layer_of_another_layout_is_prepared_anew(changes: Changes, strategy: str, prepared: list[Arguments]) -> None:
    last_strides: set[int] = set()

    def kernel(q: Tensor, k: Tensor, v: Tensor, rows: cpattn.RaggedRows, *, out_dtype: torch.dtype, **options: Any) -> Any:
        last_strides.update(x.stride(-1) for x in (q, k, v))
        return cpattn.BACKENDS["reference"].run(q, k, v, rows, AttentionOptions(**options), out_dtype)

    def run(given: Arguments, meta: cpattn.CPMetadata, group: SoloCommunicator) -> tuple[Tensor, Tensor]:
        return cpattn.cp_attention(meta=meta, group=group, return_lse=True, **given._asdict())

    shared, group = PLAN.metadata(0), SoloCommunicator(0, 2)
    for layer, (changed, number) in enumerate([(False, 1), (False, 1), (True, 2), (False, 2), (True, 2)]):
        torch.manual_seed(layer)
        given = arguments(strategy=strategy, backend=kernel)
        if changed:
            given = given._replace(**{name: change(getattr(given, name)) for name, change in changes.items()})
        got = run(given, shared, group)
        assert len(prepared) == number
        want = run(given, PLAN.metadata(0), SoloCommunicator(0, 2))
        assert prepared.pop() is not None
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    assert last_strides == {1}


def test_a_call_of_one_rank_is_not_another_s(prepared: list[Arguments]) -> None:
    meta, group = PLAN.metadata(0), SoloCommunicator(0, 2)
    find.find_call(arguments(), meta, group)
    find.find_call(arguments(), meta, group)
    assert len(prepared) == 1
    with pytest.raises(cpattn.GroupError, match="this process is rank 1 of the group"):
        find.find_call(arguments(), meta, SoloCommunicator(1, 2))
    with pytest.raises(cpattn.GroupError, match="the group has 3 ranks"):
        find.find_call(arguments(), meta, SoloCommunicator(0, 3))


def separate_pages(change: Any = lambda pages: pages) -> cpattn.PagedKV:
    """The eight pages of four tokens that PLAN needs."""
    table = torch.tensor([[5, 0, 3, 7, 1, 2], [4, 6, -1, -1, -1, -1]], dtype=torch.int32)
    k_pages, v_pages = torch.randn(2, 8, 4, 2, 16)
    return paged(change(k_pages), change(v_pages), table)


def test_a_table_on_the_cpu_is_looked_at_in_every_layer(prepared: list[Arguments]) -> None:
    """What is prepared is remembered: it does not depend on what the table holds."""
    meta, group = PLAN.metadata(0), SoloCommunicator(0, 2)
    cache = separate_pages()
    for _ in range(2):
        find.find_call(arguments(kv_cache=cache), meta, group)
    for page, message in ((8, "page_table\\[1, 0\\] is 8, but there are pages 0 to 7"), (3, "new token 8 of request 0 and new token 0 of")):
        cache.page_table[1, 0] = page
        with pytest.raises(cpattn.PageTableError, match=message):
            find.find_call(arguments(kv_cache=cache), meta, group)
    assert len(prepared) == 1


def test_pages_of_inference_mode_are_not_taken_for_others(prepared: list[Arguments]) -> None:
    meta = PLAN.metadata(0)
    with torch.inference_mode():
        made_there = separate_pages()
    find.find_call(arguments(kv_cache=separate_pages()), meta, SoloCommunicator(0, 2))
    with pytest.raises(cpattn.PageTableError, match=r"k_pages was made under torch.inference_mode\(\), and cannot be written outside"):
        find.find_call(arguments(kv_cache=made_there), meta, SoloCommunicator(0, 2))
    # Nothing is written where pages are only attended to.
    q = torch.randn(14, 4, 16)
    assert cpattn.attend(q, made_there, meta).shape == q.shape


def test_expanded_pages_are_not_taken_for_others() -> None:
    meta = PLAN.metadata(0)
    expanded = separate_pages(lambda pages: pages[:1].expand(8, -1, -1, -1))
    find.find_call(arguments(kv_cache=separate_pages()), meta, SoloCommunicator(0, 2))
    for _ in range(2):
        with pytest.raises(cpattn.PageTableError, match="several tokens lie in the same memory"):
            find.find_call(arguments(kv_cache=expanded), meta, SoloCommunicator(0, 2))
    # Neither does a call that reads them say that they can be written.
    q = torch.randn(14, 4, 16)
    assert cpattn.attend(q, expanded, meta).shape == q.shape
    with pytest.raises(cpattn.PageTableError, match="several tokens lie in the same memory"):
        find.find_call(arguments(kv_cache=expanded), meta, SoloCommunicator(0, 2))
