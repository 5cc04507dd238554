"""A few steps of tests/serving_loop.py, and that its model of a cache notices what it is for."""

from __future__ import annotations

from collections import Counter

import pytest
import serving_loop
import torch
from engines.cache_books import EngineBooks
from references.cache_model import CacheForm, CacheModel, Tokens

import cpattn


def test_a_few_steps_over_every_cache() -> None:
    """A loop of each owner rule, in bf16 and fp8."""
    done: Counter[str] = Counter()
    for number in range(6):
        done += serving_loop.serve_on_loopback(serving_loop.draw(3, number), steps=18)
    assert done.total() == 6 * 18
    assert min(done[kind] for kind in ("admit", "chunk", "decode", "speculate", "reject", "fork", "release", "fail")) > 0


def test_loops_are_of_every_kind() -> None:
    loops = [serving_loop.draw(0, number) for number in range(60)]
    assert loops == [serving_loop.draw(0, number) for number in range(60)]
    assert len({loop.kind for loop in loops}) == 3 * 2 * 2
    assert {loop.queries for loop in loops if loop.form.scales} == {"rows", "all"}
    assert {loop.known for loop in loops if loop.form.owner == "computed"} == {True, False}


@pytest.mark.parametrize(("page", "place"), [(4, 2), (1, 0), (0, 3)], ids=["a token", "beside it", "another page"])
def test_every_slot_is_compared(page: int, place: int) -> None:
    form = CacheForm(2, cpattn.Striped(1), 6, 4, 1, 8, 8, v_in_k=False, stored=torch.bfloat16, scales=None)
    books = EngineBooks(form, 1, None, known=True)
    tokens = Tokens(form, 9, torch.Generator().manual_seed(0))
    model = CacheModel(form, 1, tokens.stored, books.pages)
    model.admit("a")
    model.extend(cpattn.plan([(0, 9)], 2, owner=form.owner), {"a": range(9)})  # type: ignore[arg-type]
    # Of positions 1, 3, 5 and 7, in the order of the sequence.
    for x, stored in zip(books.pages, tokens.stored, strict=True):
        x.view(torch.int16)[4, :4] = stored[1::2]
    model.check({"a": [4]})
    books.pages[1][page, place, 0, 3] += 1
    books.pages[1][page, place, 0, 3].nan_to_num_(1.0)
    with pytest.raises(AssertionError, match=rf"\[\[{page}, {place}\]\] of rank 1"):
        model.check({"a": [4]})


def test_two_tokens_in_one_slot_are_noticed() -> None:
    form = CacheForm(1, "replicated", 4, 4, 1, 8, 8, v_in_k=True, stored=torch.bfloat16, scales=None)
    tokens = Tokens(form, 4, torch.Generator().manual_seed(0))
    model = CacheModel(form, 0, tokens.stored, [torch.zeros(4, 4, 1, 8, dtype=torch.bfloat16)])
    for name, number in (("a", 0), ("b", 1)):
        model.admit(name)
        model.extend(cpattn.plan([(0, 1)], 1), {name: [number]})
    with pytest.raises(AssertionError, match=r"b has token 1 in \(2, 0\), where 0 is"):
        model.check({"a": [2], "b": [2]})
