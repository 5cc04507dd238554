"""Speculative decoding: 2 to 8 drafts of some requests, of which a few are accepted, over every kind of cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from engines.serving_rank import Loop, Server
from references.cache_model import CacheForm
from torch import Tensor

import cpattn
from cpattn.attention.backend import AttentionOptions
from cpattn.testing import oracle_attention, run_loopback

OWNERS = ["replicated", "computed", cpattn.Striped(1), cpattn.Striped(3)]
# Of two requests: tokens of a step, and how many of them are rejected; one is not always wrong, nor all but the first.
STEPS = [((2, 8), (1, 7)), ((5, 1), (0, 0)), ((8, 7), (7, 3)), ((1, 6), (0, 5)), ((3, 2), (2, 0))]


@pytest.mark.parametrize("pool", [True, False], ids=["dropped", "overwritten in a bucket"])
@pytest.mark.parametrize(("owner", "queries"), [*((owner, "rows") for owner in OWNERS), ("computed", "all"), (OWNERS[2], "all")], ids=str)
def test_some_are_accepted_and_others_take_the_places_of_the_rest(owner: Any, queries: str, pool: bool) -> None:
    """Dropped by a pool, or overwritten in an engine's own pages, which stay. Results are the oracle's, and pages hold what they must."""
    form = CacheForm(3, owner, 40, 4, 2, 16, 16, v_in_k=False, stored=torch.bfloat16, scales=None)
    loop = Loop(0, 0, form, pool, known=True, queries=queries, bucket=not pool)

    def program(group: cpattn.Transport) -> list[int]:
        server = Server(loop, group)
        names = server.admit(), server.admit()
        server.compute(dict(zip(names, (13, 5), strict=True)))
        for counts, rejected in STEPS:
            server.compute(dict(zip(names, counts, strict=True)))
            server.check()
            for name, count in zip(names, rejected, strict=True):
                server.cut(name, count)
            server.check()
        return [len(server.model.tokens[name]) for name in names]

    expected = [13 + sum(counts[n] - rejected[n] for counts, rejected in STEPS) for n in range(2)]
    assert run_loopback(program, 3) == [[expected[0], expected[1] - 8]] * 3


BATCH = [(9, 8), (3, 2), (0, 5), (20, 1), (7, 4)]
RULES: dict[str, dict[str, Any]] = {
    "striped": {"owner": cpattn.Striped(1)},
    "striped by 3": {"owner": cpattn.Striped(3)},
    "computed": {"prefix_ranks": [[position * position % 3 for position in range(prefix)] for prefix, _ in BATCH]},
}


@pytest.mark.parametrize("queries", ["rows", "all"])
@pytest.mark.parametrize("rule", RULES)
def test_every_row_has_a_bound_of_its_own_in_each_shard(rule: str, queries: str) -> None:
    """A draft at position p sees, on each rank, those tokens up to p that lie there. With scores of 0 its LSE is the logarithm of
    their number."""
    plan = cpattn.plan(BATCH, 3, queries=queries, **RULES[rule])
    ranks = ranks_of(plan, rule)
    reference = cpattn.BACKENDS["reference"]

    def program(group: cpattn.Transport) -> Tensor:
        meta, counts = plan.metadata(group.rank), torch.zeros(3 * plan.rows)
        own = slice(group.rank * plan.rows, (group.rank + 1) * plan.rows)

        def counting(
            q: Tensor, keys: cpattn.Keys, spans: cpattn.Spans, options: AttentionOptions, out_dtype: torch.dtype
        ) -> tuple[Tensor, Tensor]:
            out, lse = reference.attend(q, keys, spans, options, out_dtype)
            # A launch is of this rank's rows, or of all ranks'.
            part = counts[own] if len(q) == plan.rows and queries == "rows" else counts[: len(q)]
            part += lse[:, 0].exp()
            return out, lse

        page_table = torch.arange(len(BATCH) * 8).view(len(BATCH), 8)
        cache = cpattn.PagedKV(torch.zeros(40, 4, 1, 8), torch.zeros(40, 4, 1, 8), page_table)
        q = torch.zeros(plan.rows, 3 if queries == "rows" else 1, 8)
        cpattn.attend(q, cache, meta, group=group, backend=replace(reference, attend=counting, accumulate=None))
        return counts[: plan.num_tokens] if queries == "all" else counts[meta.restore_index]

    for rank, counts in enumerate(run_loopback(program, 3)):
        bounds = [sum(r == rank for r in ranks[i][: p + 1]) for i, (prefix, new) in enumerate(BATCH) for p in range(prefix, prefix + new)]
        assert counts.round().int().tolist() == bounds


def ranks_of(plan: cpattn.Plan, rule: str) -> list[list[int]]:
    """The rank of each token, by request and position."""
    if plan.owner is not None:
        return [[p // plan.owner.interleave % 3 for p in range(prefix + new)] for prefix, new in BATCH]
    new = [[chunk.rank for chunk in plan.chunks if chunk.request == i for _ in range(chunk.length)] for i in range(len(BATCH))]
    return [cached + computed for cached, computed in zip(RULES[rule]["prefix_ranks"], new, strict=True)]


@pytest.mark.parametrize("owner", OWNERS, ids=str)
def test_a_tree_of_drafts_is_a_request_for_each_branch(owner: Any) -> None:
    """They share the pages of what they have in common; the branch that is accepted goes on, and the others are released."""
    torch.manual_seed(0)
    # The trunk has 11 tokens; then come branches of 3, 2 and 4.
    tokens = {name: torch.randn(3, length, 2, 8, dtype=torch.float64) for name, length in {"trunk": 11, "a": 3, "b": 2, "c": 4}.items()}
    branches = {name: torch.cat([tokens["trunk"], tokens[name]], dim=1) for name in "abc"}

    def program(group: cpattn.Transport) -> list[Tensor]:
        pool = cpattn.KVPool(12, 4, 1, 2, 8, dtype=torch.float64, owner=owner, cp_size=2, cp_rank=group.rank)

        def step(new: dict[str, Tensor]) -> Tensor:
            plan = pool.plan([(name, x.shape[1]) for name, x in new.items()])
            meta = plan.metadata(group.rank)
            q, k, v = (cpattn.shard(torch.cat([x[i] for x in new.values()]), meta) for i in range(3))
            out = cpattn.cp_attention(q, k, v, meta, group=group, kv_cache=pool.layer(0, pool.page_table(list(new))))
            return cpattn.unshard(out, meta, group=group)

        pool.admit("trunk")
        step({"trunk": tokens["trunk"]})
        for name in "abc":
            pool.fork("trunk", name, 11)
        outs = [step({name: tokens[name] for name in "abc"})]
        for name in ("trunk", "a", "c"):
            pool.release(name)
        pool.truncate("b", 12)
        outs.append(step({"b": tokens["b"][:, 1:]}))
        pool.release("b")
        assert pool.free_pages == 12
        return outs

    whole = [oracle_attention(q, k, v, [(0, len(q))])[0] for q, k, v in branches.values()]
    for tree, last in run_loopback(program, 2):
        torch.testing.assert_close(tree, torch.cat([x[11:] for x in whole]))
        torch.testing.assert_close(last, whole[1][12:])
