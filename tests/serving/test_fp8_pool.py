"""A KVPool in fp8: its scales go where tokens go, through forks, drafts that are rejected, steps undone, and other layouts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from inputs.stored_cases import StoredCase
from torch import Tensor

import cpattn
from cpattn.moves import torch_moves
from cpattn.moves.stored_rows import StoredRows
from cpattn.testing import oracle_attention, relative_rmse, run_loopback, single_device_bound

E4M3, HEADS, DIM = torch.float8_e4m3fn, 2, 16


class Conversation:
    """Requests over one pool on each rank, and what their keys are."""

    def __init__(self, group: cpattn.Transport, scales: str, owner: Any) -> None:
        self.group = group
        self.pool = cpattn.KVPool(
            16, 4, 1, HEADS, DIM, dtype=E4M3, scales=scales, owner=owner, cp_size=group.size, cp_rank=group.rank
        )  # fmt: skip
        if scales == "head":
            for scale in (self.pool.k_scale, self.pool.v_scale):
                assert scale is not None
                scale.copy_(torch.tensor([[0.01, 0.02]]))
        self.scales = scales
        self.keys: dict[str, Tensor] = {}
        self.random = torch.Generator().manual_seed(0)

    def step(self, extends: list[tuple[str, int]], *, undo: bool = False) -> None:
        """Its results are the oracle's over what the pool keeps."""
        pool, dtype = self.pool, torch.bfloat16
        plan = pool.plan(extends)
        names = [name for name, _ in extends]
        new = torch.randn(2, plan.num_tokens, HEADS, DIM, generator=self.random).to(dtype)
        q = torch.randn(plan.num_tokens, 4, DIM, generator=self.random).to(dtype)
        meta = plan.metadata(self.group.rank)
        local_q, k, v = (cpattn.shard(x, meta) for x in (q, *new))
        out = cpattn.cp_attention(local_q, k, v, meta, kv_cache=pool.layer(0, pool.page_table(names)), group=self.group)
        cached = torch.cat([self.keys.get(name, new[:, :0]) for name in names], dim=1)
        (k, v), (prefix_k, prefix_v) = self.meant(new), self.meant(cached)
        want, lse = oracle_attention(q, k, v, plan.batch, prefix_k=prefix_k, prefix_v=prefix_v)
        assert relative_rmse(cpattn.unshard(out, meta, group=self.group), want) <= single_device_bound(dtype, lse)
        if undo:
            pool.undo(plan)
            return
        for name, rows in zip(names, torch.split(new, [count for _, count in extends], dim=1), strict=True):
            self.keys[name] = torch.cat([self.keys.get(name, rows[:, :0]), rows], dim=1)

    def meant(self, kv: Tensor) -> Tensor:
        k, v = kv
        of_heads = None if self.scales == "token" else torch.tensor([0.01, 0.02])
        new = [None if of_heads is not None else torch.empty(k.shape[:2]) for _ in range(2)]
        stored = StoredRows(torch.empty_like(k, dtype=E4M3), torch.empty_like(v, dtype=E4M3), *new)
        torch_moves.quantize(stored, k, v, of_heads, of_heads)
        if of_heads is not None:
            stored = stored._replace(k_scale=of_heads, v_scale=of_heads)
        found = torch.empty_like(kv)
        torch_moves.dequantize(found[0], found[1], stored)
        return found

    def cut(self, name: str, length: int) -> None:
        self.pool.truncate(name, length)
        self.keys[name] = self.keys[name][:, :length]

    def fork(self, parent: str, child: str, length: int) -> None:
        self.pool.fork(parent, child, length)
        self.keys[child] = self.keys[parent][:, :length]


@pytest.mark.parametrize("scales", ["head", "token"])
@pytest.mark.parametrize(("cp_size", "owner"), [(1, "replicated"), (2, "replicated"), (2, "computed"), (2, cpattn.Striped(2))], ids=str)
def test_scales_go_where_tokens_go(scales: str, cp_size: int, owner: Any) -> None:
    def program(group: cpattn.Transport) -> None:
        talk = Conversation(group, scales, owner)
        talk.pool.admit("a")
        talk.step([("a", 11)])
        talk.fork("a", "b", 9)
        # Each writes into a copy of the page that they share.
        talk.step([("a", 3), ("b", 2)])
        talk.step([("b", 5), ("a", 1)], undo=True)
        talk.cut("a", 6)
        talk.step([("a", 1), ("b", 1)])

    run_loopback(program, cp_size)


def test_what_a_step_wrote_that_is_undone_is_zero() -> None:
    pool = cpattn.KVPool(4, 4, 2, HEADS, DIM, 0, dtype=E4M3, scales="token")
    pool.admit("a")
    plan = pool.plan([("a", 6)])
    assert pool.k_scale is not None
    assert pool.v_scale is None
    for x in (pool.k_pages, pool.k_scale):
        x.fill_(torch.nan)
    pool.undo(plan)
    for x in (pool.k_pages.float(), pool.k_scale):
        # The other two pages were no concern of the step.
        assert (x == 0).sum() == x.isnan().sum() == x.numel() // 2


def test_the_form_of_a_pool() -> None:
    pool = cpattn.KVPool(8, 4, 3, HEADS, DIM, dtype=torch.float8_e5m2, scales="token")
    assert "torch.float8_e5m2 with a scale for each token and head, cpu" in repr(pool)
    assert pool.k_scale is not None
    assert pool.k_scale.shape == (3, 8, 4, HEADS)
    layer = pool.layer(1, torch.zeros(1, 1, dtype=torch.int32))
    assert layer.k_scale is not None
    assert layer.k_scale.data_ptr() == pool.k_scale[1].data_ptr()
    assert cpattn.KVPool(8, 4, 3, HEADS, DIM).k_scale is None
    for given, message in (
        ({"dtype": E4M3}, "scales=None beside dtype=torch.float8_e4m3fn; pass 'token'"),
        ({"dtype": E4M3, "scales": "one"}, "scales='one' beside"),
        ({"scales": "head"}, "scales='head', but dtype=torch.float32; scales are for pages in fp8"),
        ({"dtype": torch.float8_e4m3fnuz, "scales": "head"}, "of fp8 pages may be in torch.float8_e4m3fn and torch.float8_e5m2"),
    ):
        with pytest.raises(cpattn.CPError) as raised:
            cpattn.KVPool(8, 4, 3, HEADS, DIM, **given)
        assert message in str(raised.value)


RULES: dict[str, dict[str, Any]] = {
    "replicated": {},
    "computed": {"prefix_ranks": [[position * position % 3 for position in range(prefix)] for prefix in (29, 0, 9, 1)]},
    "striped by 2": {"owner": cpattn.Striped(2)},
    "striped by 7": {"owner": cpattn.Striped(7)},
}


@pytest.mark.parametrize("scales", ["head", "token"])
@pytest.mark.parametrize("v_in_k", [False, True], ids=["", "v in k"])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((3, "striped by 7"), (5, "striped by 2")),
        ((5, "computed"), (3, "striped by 7")),
        ((3, "replicated"), (5, "computed")),
        ((5, "striped by 2"), (3, "replicated")),
    ],
    ids=str,
)
def test_another_layout(old: tuple[int, str], new: tuple[int, str], scales: str, v_in_k: bool) -> None:
    """Numbers and scales are moved to the bit, between groups of which neither size divides the other, and pages of other sizes."""
    case = StoredCase(
        [(29, 2), (0, 2), (9, 2), (1, 2)], cache="paged", page_size=4, scales=scales, v_in_k=v_in_k, v_head_dim=10, head_dim=18
    )
    prefixes = [(prefix, 0) for prefix, _ in case.batch]
    plans = [cpattn.plan(prefixes, size, **RULES[rule]) for size, rule in (old, new)]

    def program(group: cpattn.Transport) -> None:
        before = case.pages(plans[0], group.rank) if group.rank < old[0] else None
        after = replace(case, page_size=5).pages(plans[1], group.rank) if group.rank < new[0] else None
        caches = [None if pages is None else pages.cache for pages in (before, after)]
        if after is not None:
            of_tokens = (after.cache.k_scale, after.cache.v_scale) if scales == "token" else ()
            for x in (after.cache.k_pages, after.cache.v_pages, *of_tokens):
                if x is not None:
                    x.fill_(torch.nan)
        cpattn.relayout(caches[0], plans[0], caches[1], plans[1], group=group, check=True)
        for pages in filter(None, (before, after)):
            pages.check_written()

    run_loopback(program, 5)


def test_another_layout_needs_the_same_scales() -> None:
    case = StoredCase([(5, 0)], cache="paged", page_size=4, scales="head")
    plan = case.plan(1)
    source, target = (case.pages(plan, 0).cache for _ in range(2))
    assert source.k_scale is not None
    with pytest.raises(cpattn.TensorMismatchError, match=r"k_scale is .* in cache and .* in to_cache; numbers are moved as they are"):
        cpattn.relayout(source, plan, replace(target, k_scale=2 * source.k_scale), plan)
    of_tokens = {name: torch.ones(*target.k_pages.shape[:3]) for name in ("k_scale", "v_scale")}
    with pytest.raises(cpattn.TensorMismatchError, match="a scale belongs to a token in one place, to a head in another"):
        cpattn.relayout(source, plan, replace(target, **of_tokens), plan)
