"""What is refused of strategies that divide heads, over a grid of heads, ranks and caches: all that a message says must be true.

Where it says what to do, that is done, and has to work.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
import torch

import cpattn
from cpattn.exchange.head_shares import head_shares
from cpattn.testing import run_loopback

# Where there is no cache, without the prefix.
BATCH = [(5, 7), (0, 2)]
HEADS = [(1, 1), (2, 1), (3, 3), (4, 2), (6, 2)]
CACHES = [None, "packed", "own packed", "pages", "own pages", "striped", "own striped"]
CP_SIZES = [3, 4]
STRATEGIES: list[Any] = ["ulysses", "helix", cpattn.hybrid(2), cpattn.hybrid(3)]
PAGE_SIZE, PAGES = 4, 4


# A call is the answer to several questions: half of them have been asked before.
@functools.cache
def attempt(strategy: Any, heads: tuple[int, int], cp_size: int, cache: str | None, queries: str = "rows") -> str | None:
    """Runs a call; what is refused, on every rank alike, or None where it works."""
    (q_heads, kv_heads), is_striped = heads, cache is not None and "striped" in cache
    batch = BATCH if cache else [(0, extend_len) for _, extend_len in BATCH]
    owner: Any = {"owner": cpattn.Striped(1)} if is_striped else {}
    plan = cpattn.plan(batch, cp_size, queries=queries, **owner)

    def program(group: cpattn.Transport) -> str | None:
        meta = plan.metadata(group.rank)
        rows_q = q_heads // cp_size if queries == "all" else q_heads
        q, k = (torch.ones(meta.rows, number, 8) for number in (rows_q, kv_heads))
        cached = own_heads(strategy, heads, cp_size, group.rank) if cache and "own" in cache else kv_heads
        kv_cache: cpattn.PackedKV | cpattn.PagedKV | None = None
        if cache and "packed" in cache:
            kv_cache = cpattn.PackedKV(*torch.ones(2, plan.num_prefix_tokens, cached, 8))
        elif cache:
            table = torch.arange(len(batch) * PAGES, dtype=torch.int32).view(len(batch), PAGES)
            k_pages, v_pages = torch.ones(2, len(batch) * PAGES, PAGE_SIZE, cached, 8)
            kv_cache = cpattn.PagedKV(k_pages, v_pages, table)
        try:
            out = cpattn.cp_attention(q, k, k, meta, group=group, kv_cache=kv_cache, strategy=strategy)
        except cpattn.CPError as error:
            # Ranks have as many rows as they have.
            return re.sub(r"\(\d+(, \d+)+\)", "(..)", str(error))
        # Of ones alone.
        assert torch.allclose(out[: meta.num_tokens], torch.ones(()))
        return None

    said = set(run_loopback(program, cp_size, timeout=10))
    assert len(said) == 1, said
    return said.pop()


def own_heads(strategy: Any, heads: tuple[int, int], cp_size: int, rank: int) -> int:
    """Of a rank's cache: its share, or one head where there is none."""
    within = getattr(strategy, "within", None) or cp_size
    return head_shares(*heads, within)[rank % within].kv_heads if heads[0] >= within and cp_size % within == 0 else 1


@pytest.mark.parametrize("cache", CACHES, ids=str)
@pytest.mark.parametrize("cp_size", CP_SIZES)
@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_a_refusal_is_true_and_what_it_says_to_do_works(strategy: Any, cp_size: int, cache: str | None) -> None:
    for heads in HEADS:
        said = attempt(strategy, heads, cp_size, cache)
        if said is not None:
            check_what_is_said(said, strategy, heads, cp_size, cache)
            continue
        within = getattr(strategy, "within", None) or cp_size
        assert cp_size % within == 0
        assert heads[0] >= within, f"{strategy}, {heads} heads, {cp_size} ranks, {cache}: a rank has no head, and nothing is said"


def check_what_is_said(said: str, strategy: Any, heads: tuple[int, int], cp_size: int, cache: str | None) -> None:
    (q_heads, kv_heads), within = heads, getattr(strategy, "within", None) or cp_size
    where = f"{strategy}, {heads} heads, {cp_size} ranks, {cache}: {said}"
    if said.endswith(" could"):
        for name in re.findall(r"'(\w+)'", said[said.rindex(";") :]):
            assert attempt(name, heads, cp_size, cache) is None, f"{name} cannot: {where}"
    if "query head" in said and "cannot be divided" in said:
        assert q_heads < within, where
        assert f"{q_heads} query head{'s' * (q_heads > 1)} cannot be divided among {within} ranks" in said
        advised = re.search(r"cpattn\.hybrid\((\d+)\)", said)
        if advised:
            further = attempt(cpattn.hybrid(int(advised[1])), heads, cp_size, cache)
            # Of these pages another thing may be refused then.
            assert further is None or "cannot be divided" not in further, where
        else:
            assert not [size for size in range(2, q_heads + 1) if cp_size % size == 0], where
            assert attempt("ring", heads, cp_size, cache.replace("own ", "") if cache else None) is None, where
        return
    if "is no multiple of that" in said:
        assert cp_size % within, where
        divisor = next(size for size in range(1, cp_size + 1) if cp_size % size == 0)
        assert "is no multiple" not in str(attempt(cpattn.hybrid(divisor), heads, cp_size, cache)), where
        return
    if "pass queries='all'" in said:
        assert strategy == "helix", where
        if q_heads % cp_size == 0:
            assert attempt(strategy, heads, cp_size, "striped", queries="all") is None, where
        return
    if "pass pages of a rank's own heads" in said:
        shares = sorted({share.kv_heads for share in head_shares(*heads, within)})
        assert f"pages of all {kv_heads} KV heads want all heads of new tokens, and a rank gets {' or '.join(map(str, shares))} of" in said
        assert attempt(strategy, heads, cp_size, "own pages") is None, where
        return
    if "keep each rank's KV heads of all tokens" in said:
        assert cache is not None
        assert "striped" in cache, where
        assert attempt(strategy, heads, cp_size, "own pages") is None, where
        return
    if "the cache has a rank's own alone" in said or "a cache of a rank's own heads is for" in said:
        assert cache is not None
        assert "own" in cache, where
        further = attempt(strategy, heads, cp_size, cache.replace("own ", ""))
        # Of this plan another thing may be refused then.
        assert further is None or "own" not in further, where
        return
    pytest.fail(f"not checked: {where}")
