"""What a KVPool is told that makes no sense: each argument is refused with what was passed, the rule and the fix."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import cpattn


def pool_of(num_layers: int = 1, **options: Any) -> cpattn.KVPool:
    return cpattn.KVPool(num_pages=8, page_size=4, num_layers=num_layers, kv_heads=2, head_dim=8, **options)


SIZES = ["num_pages", "page_size", "num_layers", "kv_heads", "head_dim", "cp_size"]
DTYPES: list[Any] = [torch.int8, torch.complex64, "float32", np.float32, None]
WRONG: list[tuple[dict[str, Any], str]] = [
    *(
        ({name: wrong}, f"{name}={wrong!r}; pass an integer from 1 to 2147483647")
        for name in SIZES
        for wrong in (0, -1, True, 2.0, "2", 2**31)
    ),
    *(({"v_head_dim": wrong}, f"v_head_dim={wrong!r}; pass an integer from 0 to 2147483647") for wrong in (-1, False, 0.0)),
    *(({"cp_size": 2, "cp_rank": wrong}, f"cp_rank={wrong!r}; pass .* from 0 to 1 .cp_size is 2") for wrong in (2, -1, True, 0.0)),
    *(({"dtype": wrong}, "dtype=.*; pass the floating torch dtype") for wrong in DTYPES),
    *(({"sharded": wrong}, f"sharded={wrong!r} .*; pass True or False") for wrong in (1, "yes")),
    *(
        ({"owner": wrong}, f"owner={wrong!r}; pass 'replicated', 'computed' or cpattn.Striped.interleave.")
        for wrong in ("striped", 4, True)
    ),
    ({"owner": "computed", "sharded": True}, "owner='computed' beside sharded=True; .* so leave sharded out"),
    *(({"device": wrong}, f"device={wrong!r} cannot be used on this machine .*; pass one of 'cpu'") for wrong in ("gpu", "", "cuda:99")),
    ({"device": "meta"}, "device='meta' holds no data, and pages are to hold keys and values; pass 'cpu'"),
    *(({"device": wrong}, f"device={wrong!r} is a .*; pass a torch.device or its name, one of 'cpu'") for wrong in (None, 1.5, True)),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=str)
def test_what_no_pool_can_be_made_of(options: dict[str, Any], message: str) -> None:
    sizes = {"num_pages": 8, "page_size": 4, "num_layers": 1, "kv_heads": 2, "head_dim": 8}
    with pytest.raises(cpattn.CPError, match=message) as refusal:
        cpattn.KVPool(**(sizes | options))
    assert isinstance(refusal.value, cpattn.RankError) == ("cp_rank" in options)


@pytest.mark.parametrize("size", [2**31 - 1, 2**24], ids=["more than a size can say", "more than there is"])
def test_pages_that_cannot_be_had_are_refused_with_their_size(size: int) -> None:
    message = (
        f"{size} pages of {size} tokens in 3 layers, 2 heads of 8 each in torch.bfloat16, are {size * size * 96} bytes, which cannot be "
        r"had on cpu \(.+\); they are made at once, for K and for V: give fewer num_pages"
    )
    with pytest.raises(cpattn.CPError, match=message):
        cpattn.KVPool(size, size, num_layers=3, kv_heads=2, head_dim=8, dtype=torch.bfloat16)


def test_a_request_with_too_many_new_tokens_is_named() -> None:
    pool = pool_of()
    for name in "ab":
        pool.admit(name)
    with pytest.raises(cpattn.BatchError, match=r"request 'b' gets 1099511627776 new tokens; the limit is 2147483647 .*: give fewer"):
        pool.plan([("a", 1), ("b", 2**40)])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda")])
def test_a_gpu_that_is_not_there_is_named(device: str | torch.device) -> None:
    message = rf"device={re.escape(repr(device))} cannot be used on this machine \(.+\); pass one of 'cpu' \(torch finds no CUDA device\)"
    with pytest.raises(cpattn.CPError, match=message):
        pool_of(device=device)


def test_integers_of_numpy_are_welcome() -> None:
    integer: Any = np.int32
    pool = cpattn.KVPool(*map(integer, (8, 4, 1, 2, 8)), cp_size=integer(2), cp_rank=integer(1), sharded=True)
    pool.admit(np.int64(3))
    pool.plan([(np.int64(3), integer(9))])
    pool.fork(3, 4, integer(9))
    pool.truncate(4, integer(8))
    assert pool.length(4) == 8
    assert pool.page_table([3, 4], shape=(integer(2), integer(3))).shape == (2, 3)
    assert pool.layer(integer(0), pool.page_table((3,))).k_pages.shape == (8, 4, 2, 8)
    assert [type(size) for size in (pool.page_size, pool.cp_size, pool.cp_rank)] == [int] * 3


@pytest.mark.parametrize("name", [["a"], {"a": 1}, ("a", [])], ids=str)
def test_names_without_a_hash_are_refused(name: Any) -> None:
    pool = pool_of()
    pool.admit("a")
    uses: list[Callable[[], object]] = [lambda: pool.admit(name), lambda: pool.length(name), lambda: pool.release(name)]
    uses += [lambda: pool.fork(name, "b", 0), lambda: pool.fork("a", name, 0), lambda: pool.truncate(name, 0)]
    uses += [lambda: pool.page_table([name]), lambda: pool.plan([(name, 1)])]
    message = re.escape(f"request {name!r} is a {type(name).__name__}, which has no hash; name requests by strings, integers or tuples")
    for use in uses:
        with pytest.raises(cpattn.CPError, match=message):
            use()


@pytest.mark.parametrize("requests", ["a", b"a", None, 3, {"a"}], ids=str)
def test_requests_of_a_page_table_are_a_sequence_of_names(requests: Any) -> None:
    """A text is a sequence of letters, and a set is in another order on every rank."""
    pool = pool_of()
    pool.admit("a")
    with pytest.raises(cpattn.CPError, match=r"requests is .*; pass a sequence of names in the order of the plan, such as \['a', 'b'\]"):
        pool.page_table(requests)


@pytest.mark.parametrize("shape", [(2,), (2, 2, 2), (0, 2), (2, -1), (True, 2), (2.0, 2), 4, "22"], ids=str)
def test_the_shape_of_a_page_table_is_a_pair_of_integers(shape: Any) -> None:
    pool = pool_of()
    pool.admit("a")
    message = re.escape(f"shape={shape!r}; pass a pair of integers of at least 1, (requests, pages of each), or None")
    with pytest.raises(cpattn.CPError, match=message):
        pool.page_table(["a"], shape=shape)


def test_layers_and_tables_that_do_not_exist_are_refused() -> None:
    pool = pool_of(num_layers=3)
    pool.admit("a")
    table = pool.page_table(["a"])
    wrong: Any
    for wrong in (3, -1, True, 1.0, None):
        with pytest.raises(cpattn.CPError, match=f"layer={wrong!r}, but the pool has 3 layers; pass an integer from 0 to 2"):
            pool.layer(wrong, table)
    for wrong, what in ((table[0], r"is \(1,\) torch.int32"), (table.float(), r"is \(1, 1\) torch.float32"), (["a"], "is a list")):
        with pytest.raises(cpattn.PageTableError, match=f"page_table {what}; pass what pool.page_table returned"):
            pool.layer(0, wrong)


def test_a_pool_says_what_it_is() -> None:
    pool = pool_of(num_layers=3, v_head_dim=0, dtype=torch.bfloat16, cp_size=2, cp_rank=1, sharded=True)
    pool.admit("a")
    pool.plan([("a", 13)])
    text = "KVPool(8 pages of 4 tokens, 6 free, 1 requests, 3 layers of 2 heads, k 8, v 0, torch.bfloat16, cpu, rank 1 of 2, sharded)"
    assert repr(pool) == text


def test_pages_made_in_inference_mode_are_written_outside_of_it() -> None:
    """Else a step that copies a page would fail halfway, with its pages taken."""
    with torch.inference_mode():
        pool = pool_of()
    pool.admit("a")
    pool.plan([("a", 6)])
    pool.fork("a", "b", 6)
    pool.undo(pool.plan([("b", 1)]))
    assert not pool.k_pages.is_inference()
