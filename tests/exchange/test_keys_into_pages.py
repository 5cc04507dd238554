"""Pages that every rank holds whole: what is there before the attention, and what comes beside or after it."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, cast

import pytest
import torch
from devices.peers_on_host import let_read
from inputs.cases import AttentionCase
from inputs.own_partitions import OwnPartition
from torch import Tensor

import cpattn
from cpattn.attention import reference
from cpattn.attention.backend import AttentionFunction
from cpattn.exchange.traveling_keys import traveling_keys
from cpattn.keys import Keys
from cpattn.metadata import needed_keys
from cpattn.metadata.needed_keys import lacking_rows
from cpattn.spans import Spans
from cpattn.testing import run_loopback

# One request that is cut among all ranks, beside some that are short.
MIXED = [(3, 90), (0, 5), (7, 0), (40, 9), (0, 6), (0, 13), (21, 1), (0, 8)]
WHOLE = [(5, 12)] * 3


def new_tokens_in(k_pages: Tensor, k: Tensor, case: AttentionCase, table: Tensor) -> set[int]:
    """Which new tokens of the batch lie in their slots."""
    places = [(request, prefix + i) for request, (prefix, extend) in enumerate(case.batch) for i in range(extend)]
    slots = [(int(table[request, position // case.page_size]), position % case.page_size) for request, position in places]
    return {token for token, (page, in_page) in enumerate(slots) if torch.equal(k_pages[page, in_page], k[token])}


def tokens_of(plan: cpattn.Plan, rank: int, window: int | None) -> set[int]:
    """The new tokens of the batch that a rank holds or that its queries see, one by one."""
    begins = plan.extend_lens.cumsum() - plan.extend_lens
    return {
        int(begins[chunk.request]) + key
        for chunk in plan.chunks
        if chunk.rank == rank
        for query in range(chunk.start, chunk.start + chunk.length)
        for key in range(0 if window is None else max(0, query - window + 1), query + 1)
    }


def attend_to_whole_ranges(q: Tensor, keys: Keys, spans: Spans, options: Any, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What kernels do that load whole tiles: keys that no window reaches are multiplied by a weight of 0."""
    out = q.new_zeros(len(q), q.shape[1], keys.v.shape[-1], dtype=out_dtype)
    lse = q.new_full((len(q), q.shape[1]), -torch.inf)
    for first, q_len, k_start, k_len, diagonal, request in zip(*(column.tolist() for column in spans.host), strict=True):
        if k_len:
            queries = slice(first, first + q_len)
            k, v = reference.keys_of(keys, request, k_start, k_start + k_len)
            out[queries], lse[queries] = reference._attend(q[queries], k, v, diagonal, options)
    return out, lse


@pytest.mark.parametrize("window", [None, 1, 12])
@pytest.mark.parametrize(
    ("batch", "options"),
    [(MIXED, {"partition": "whole", "pad_to": 4}), (MIXED, {}), (MIXED, {"partition": OwnPartition(3)}), (WHOLE, {"partition": "whole"})],
    ids=["mixed", "zigzag", "own", "whole"],
)
def test_no_more_is_there_before_the_attention_than_its_queries_see(
    batch: Any, options: Any, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the byte; and afterwards all is in its slot, whatever was sent when."""
    case = AttentionCase(batch, cache="paged", window=window, overlap=2, page_size=5, sinks=True)
    plan = case.plan(3, **options)
    found: dict[int, list[Tensor]] = {}

    def note(q: Tensor, keys: Keys, *more: Any) -> tuple[Tensor, Tensor]:
        found[threading.get_ident()].append(keys.k.clone())
        return attend_to_whole_ranges(q, keys, *more)

    noting: Any = replace(reference.BACKEND, attend=cast("AttentionFunction", note))
    problem = case.problem(plan)

    def attend(group: cpattn.Transport) -> Any:
        meta, pages, before = plan.metadata(group.rank), case.pages(plan, group.rank), group.bytes_sent
        q, k, v = (cpattn.shard(x, meta) for x in (case.q, case.k, case.v))
        there = found[threading.get_ident()] = []
        out, lse = cpattn.cp_attention(
            q, k, v, meta, group=group, kv_cache=pages.cache, strategy="all_gather", backend=noting,
            return_lse=True, overlap=2, **case.options,
        )  # type: ignore[call-overload]  # fmt: skip
        pages.check_written()
        # Launch after launch, one for each group of heads.
        tokens = [new_tokens_in(k_pages, case.k[:, n : n + 1], case, pages.cache.page_table) for n, k_pages in enumerate(there)]
        return (out, lse), tokens, group.bytes_sent - before

    baseline: list[Any] = []
    for most, what in ((0.0, "all"), (1.0, "needed")):
        monkeypatch.setattr(needed_keys, "MOST_NEEDED", most)
        plan.memo.clear()
        lacking = lacking_rows(plan, window)
        travels = traveling_keys(problem, plan)
        assert travels.what == (what if lacking.most else "nothing")
        results = run_loopback(attend, 3)
        for rank, ((out, lse), there, sent) in enumerate(results):
            wanted = set(range(plan.num_tokens)) if travels.what == "all" else tokens_of(plan, rank, window)
            assert there == ([wanted, wanted] if plan.rank_tokens[rank] else [])
            if baseline:
                assert torch.equal(out, baseline[rank][0])
                assert torch.equal(lse, baseline[rank][1])
            # What is sent first is not sent again.
            rows = plan.rank_tokens[rank] if travels.what == "needed" else plan.rows
            assert sent == 2 * rows * problem.key_bytes  # to two others
            assert sent == (travels.sent + travels.rest_sent)[rank] * problem.key_bytes
        baseline = [result for result, *_ in results]


# First chunks: what is cached is of requests without new tokens.
FIRST = [(0, 90), (0, 5), (7, 0), (0, 0), (0, 9), (0, 6), (0, 13), (0, 1), (0, 8)]
FIRST_WHOLE = [(0, 12), (3, 0), (0, 12), (0, 12)]


@pytest.mark.parametrize("peers", [False, True], ids=["collectives", "peers"])
@pytest.mark.parametrize(
    ("batch", "window", "options"),
    [
        (FIRST, None, {"partition": "whole", "pad_to": 4}),
        (FIRST, 12, {"partition": "whole", "pad_to": 4}),
        (FIRST, None, {}),
        (FIRST, 1, {}),  # nothing travels, and yet a rank's own rows do not follow each other
        (FIRST, 12, {"partition": OwnPartition(3)}),
        (FIRST_WHOLE, None, {"partition": "whole"}),
    ],
    ids=["mixed", "mixed, window", "zigzag", "zigzag, window of 1", "own", "whole"],
)
def test_first_chunks_are_attended_to_before_they_are_in_the_pages(
    batch: Any, options: Any, window: int | None, peers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a kernel that reads no pages. Bits are those of one that does; and then all new keys are in their slots, each read once."""
    case = AttentionCase(batch, cache="paged", window=window, overlap=2, page_size=5, sinks=True)
    pages_of: dict[int, cpattn.PagedKV] = {}
    launches: dict[int, int] = {}

    def note(q: Tensor, keys: Keys, *more: Any) -> tuple[Tensor, Tensor]:
        thread = threading.get_ident()
        cache, heads = pages_of[thread], slice(launches[thread], launches[thread] + keys.k.shape[1])
        assert keys.page_table is None
        assert not new_tokens_in(cache.k_pages[:, :, heads], case.k[:, heads], case, cache.page_table)
        launches[thread] += keys.k.shape[1]
        return attend_to_whole_ranges(q, keys, *more)

    over_pages: Any = replace(reference.BACKEND, attend=cast("AttentionFunction", attend_to_whole_ranges))
    noting: Any = replace(over_pages, attend=cast("AttentionFunction", note), reads_pages=lambda problem: False)

    def in_pages(plan: cpattn.Plan, group: cpattn.Transport) -> tuple[Tensor, Tensor]:
        return case.on_rank(plan, group.rank, group, "all_gather", over_pages)

    def attend(plan: cpattn.Plan, group: cpattn.Transport) -> tuple[Tensor, Tensor]:
        made = let_read(group) if peers else []
        meta, pages = plan.metadata(group.rank), case.pages(plan, group.rank)
        q, k, v = (cpattn.shard(x, meta) for x in (case.q, case.k, case.v))
        for x in (q, k, v):
            x[meta.num_tokens :] = torch.nan
        pages_of[threading.get_ident()], launches[threading.get_ident()] = pages.cache, 0
        out, lse = cpattn.cp_attention(
            q, k, v, meta, group=group, kv_cache=pages.cache, strategy="all_gather", backend=noting,
            return_lse=True, overlap=2, **case.options,
        )  # type: ignore[call-overload]  # fmt: skip
        pages.check_written()
        assert launches[threading.get_ident()] == (case.kv_heads if meta.num_tokens else 0)
        # Of each group of heads.
        assert {sum(rows.take_read()) for rows in made} <= {plan.num_tokens - meta.num_tokens}
        assert (out[meta.num_tokens :] == 0).all()
        return out[: meta.num_tokens], lse[: meta.num_tokens]

    # Also where it would be no faster.
    monkeypatch.setattr("cpattn.call.choose.is_order_faster", lambda problem, plan, machine, kernel, reads_pages: not reads_pages)
    plans = {cp_size: case.plan(cp_size, **options) for cp_size in (1, 2, 3)}
    for cp_size, most in ((1, 1.0), (2, 1.0), (3, 0.0), (3, 1.0)):
        monkeypatch.setattr(needed_keys, "MOST_NEEDED", most)
        plan = plans[cp_size]
        plan.memo.clear()
        expected = run_loopback(partial(in_pages, plan), cp_size)
        for rank, (out, lse) in enumerate(run_loopback(partial(attend, plan), cp_size)):
            meta = plan.metadata(rank)
            index = meta.token_index[: meta.num_tokens].long()
            assert torch.equal(out, expected[rank][0][index])
            assert torch.equal(lse, expected[rank][1][index])
    case.check(expected, plan, "all_gather", "reference")


def test_a_rank_that_needs_nothing_attends_while_others_have_not_come() -> None:
    case = AttentionCase(WHOLE, cache="paged")
    plan, has_attended = case.plan(3, partition="whole"), threading.Event()

    def note(*arguments: Any) -> tuple[Tensor, Tensor]:
        has_attended.set()
        return reference.reference_attention(*arguments)

    def program(group: cpattn.Transport) -> Any:
        if group.rank:
            assert has_attended.wait(20)
        return case.on_rank(plan, group.rank, group, "all_gather", replace(reference.BACKEND, attend=cast("AttentionFunction", note)))

    case.check(run_loopback(program, 3, timeout=30), plan, "all_gather", "reference")


@pytest.mark.parametrize("batch", [WHOLE, MIXED], ids=["whole", "mixed"])
def test_others_get_the_rest_of_a_rank_whose_kernel_raises(batch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has sent it by then; and the next call works on all."""
    monkeypatch.setattr(needed_keys, "MOST_NEEDED", 1.0)
    case = AttentionCase(batch, cache="paged", page_size=5)
    plan = case.plan(3, partition="whole")

    def fails(*arguments: Any) -> tuple[Tensor, Tensor]:
        raise MemoryError("no memory for this launch")

    def program(group: cpattn.Transport) -> Any:
        backend: Any = replace(reference.BACKEND, attend=cast("AttentionFunction", fails)) if group.rank == 1 else "reference"
        with pytest.raises(MemoryError) if group.rank == 1 else nullcontext():
            # Its pages are looked at.
            case.on_rank(plan, group.rank, group, "all_gather", backend)
        if group.rank == 1:
            # The others bring their results together, and its.
            for shape in ((16,), ()):
                cpattn.unshard(torch.zeros(plan.rows, case.heads, *shape), plan.metadata(1), group=group)
        return case.on_rank(plan, group.rank, group, "all_gather", "reference", check=True)

    case.check(run_loopback(program, 3, timeout=20), plan, "all_gather", "reference")


@pytest.mark.parametrize("window", [None, 12])
@pytest.mark.parametrize("cache", ["paged", "packed"])
def test_exact_reads_in_a_bucket_through_peers_memory(cache: str, window: int | None) -> None:
    """One prepared call for zigzag, whole and mixed batches: of each a rank reads first what its queries see, and no more."""
    bucket = cpattn.Bucket(max_requests=8, max_rows=96, max_chunks=16, max_seqlen=160)
    no_prefix = [(0, extend) for _, extend in MIXED]
    batches = [(WHOLE, "whole"), (MIXED, "zigzag"), (MIXED, "whole"), ([], "zigzag"), (WHOLE, "whole"), ([(0, 7)], "zigzag")]
    cases = [
        (AttentionCase(batch if cache == "paged" else no_prefix[: len(batch)], cache=cache, window=window, seed=seed), partition)
        for seed, (batch, partition) in enumerate(batches)
    ]

    def program(group: cpattn.Transport) -> Any:
        made = let_read(group)
        meta = cpattn.plan([], 3).metadata(group.rank, bucket=bucket)
        store = torch.zeros(2, 64, 16, 2, 16)
        table = torch.zeros(8, 8, dtype=torch.int32)
        kv_cache = cpattn.PagedKV(store[0], store[1], table) if cache == "paged" else None
        results, call = [], None
        for case, partition in cases:
            plan = case.plan(3, partition=partition)
            meta.copy_(plan)
            q, k, v = (cpattn.shard(x, meta) for x in (case.q, case.k, case.v))
            pages = case.pages(plan, group.rank, max_requests=8)
            in_store = [x[: len(pages.cache.k_pages)] for x in store]
            for x, y in zip(
                [*in_store, table[:, : pages.table.shape[1]]],
                (pages.cache.k_pages, pages.cache.v_pages, pages.cache.page_table),
                strict=True,
            ):
                x.copy_(y)
            if call is None:
                call = cpattn.prepare(
                    q,
                    k,
                    v,
                    meta,
                    group=group,
                    kv_cache=kv_cache,
                    strategy="all_gather",
                    backend="reference",
                    window=window,
                    return_lse=True,
                )
            result = call(q, k, v, kv_cache)
            results.append((tuple(cpattn.unshard(x, meta, group=group)[: plan.num_tokens] for x in result), made[0].take_read()))
            if kv_cache is not None:
                pages.cache.k_pages.copy_(in_store[0])
                assert pages.cache.v_pages is not None
                pages.cache.v_pages.copy_(in_store[1])
                pages.check_written()
        assert len(made) == 1
        return results

    by_rank = run_loopback(program, 3, timeout=30)
    for n, (case, partition) in enumerate(cases):
        plan = case.plan(3, partition=partition)
        case.check([results[n][0] for results in by_rank], plan, "all_gather", "reference")
        for rank, results in enumerate(by_rank):
            needed, *rest = results[n][1]
            assert needed == len(tokens_of(plan, rank, window)) - plan.rank_tokens[rank]
            assert sum(rest) == (plan.num_tokens - plan.rank_tokens[rank] - needed if cache == "paged" else 0)
