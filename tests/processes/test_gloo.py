"""Real processes over gloo: exactness, errors on every rank alike, and a rank that dies."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from inputs.cases import EXCHANGES, HEAD_EXCHANGES, STRIPED_EXCHANGES, AttentionCase
from inputs.stored_cases import StoredCase
from inputs.strategies import Batch
from peers.work import Work
from programs import group_programs, split_heads
from programs import rank_programs as programs

import cpattn
from cpattn.exchange.traveling_keys import traveling_keys
from cpattn.testing import ProcessRanks, oracle_attention, relative_rmse, single_device_bound

MIXED = [(0, 131), (64, 57), (0, 3), (97, 1), (30, 0), (0, 1)]


@pytest.mark.parametrize(("strategy", "cache"), EXCHANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_attention_is_exact(ranks: ProcessRanks, strategy: str, cache: str, dtype: torch.dtype) -> None:
    case = AttentionCase(MIXED, dtype=dtype, sinks=True, cache=cache)
    for partition in ("zigzag", "contiguous", "whole"):
        plan = case.plan(ranks.size, partition=partition, pad_to=16)
        case.check(ranks.run(programs.attend, case, plan, strategy, "cpu"), plan, strategy, "cpu")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="on GPUs tests/gpu/test_peer_memory.py does the same")
def test_keys_that_come_late_through_memory_that_processes_share(ranks: ProcessRanks, tmp_path: Path) -> None:
    """Each rank posts, waits for the others and pulls in one launch, or in two where cached keys are put between, turn after turn."""
    pytest.importorskip("triton")
    from programs import late_programs

    cases = [AttentionCase(batch, heads=2, kv_heads=1) for batch in ([(0, 37), (0, 5)], [(0, 1)], [(130, 40), (3, 9)])]
    for same, late in ranks.run(late_programs.take_turns, tmp_path, cases, [0, 0, 2, 0, 1, 2, 2, 0]):
        assert same == [True] * 8
        assert late == 7


@pytest.mark.parametrize(("strategy", "cache"), HEAD_EXCHANGES)
def test_divided_heads_are_exact(ranks: ProcessRanks, strategy: str, cache: str) -> None:
    """Of three ranks two share a KV head, whose query heads are 3."""
    case = AttentionCase(MIXED, heads=6, dtype=torch.bfloat16, sinks=True, cache=cache)
    plan = case.plan(ranks.size, pad_to=16)
    case.check(ranks.run(programs.attend, case, plan, strategy, "cpu"), plan, strategy, "cpu")


@pytest.mark.parametrize(("strategy", "cache"), [("all_gather", "paged"), ("pass_q", "striped")])
def test_fp8_travels_as_bytes(ranks: ProcessRanks, strategy: str, cache: str) -> None:
    case = StoredCase(MIXED, dtype=torch.bfloat16, cache=cache)
    plan = case.plan(ranks.size, pad_to=16)
    case.dequantised().check(ranks.run(programs.attend, case, plan, strategy, "cpu"), plan, strategy, "cpu")


def test_only_keys_that_are_needed_travel(ranks: ProcessRanks) -> None:
    """One request is cut among all ranks, and some ranks may have nothing to send. Pages get the rest in a message of their own."""
    for cache in ("packed", "paged"):
        case = AttentionCase([(9, 150), *[(9, 40)] * 9], dtype=torch.bfloat16, overlap=2, cache=cache)
        plan = case.plan(ranks.size, partition="whole")
        assert traveling_keys(case.problem(plan), plan).what == "needed"
        case.check(ranks.run(programs.attend, case, plan, "all_gather", "cpu"), plan, "all_gather", "cpu")


@pytest.mark.parametrize("strategy", cpattn.STRATEGIES)
def test_window_and_softcap(ranks: ProcessRanks, strategy: str) -> None:
    case = AttentionCase(MIXED, window=37, softcap=10.0, v_head_dim=8)
    plan = cpattn.plan(case.batch, ranks.size)
    case.check(ranks.run(programs.attend, case, plan, strategy, "reference"), plan, strategy, "reference")


@pytest.mark.parametrize(("strategy", "cache"), [*EXCHANGES, *STRIPED_EXCHANGES])
def test_batches_of_any_size_one_after_another(ranks: ProcessRanks, strategy: str, cache: str) -> None:
    batches: list[Batch] = [[(0, 300)], [(0, 1)], [], [(9, 0)], [(0, 2), (70, 1)], [(50, 90)] * 3]
    cases = [AttentionCase(batch, cache=cache) for batch in batches]
    for case, *outputs in zip(cases, *ranks.run(programs.attend_many, cases, strategy), strict=True):
        case.check(outputs, case.plan(ranks.size), strategy, "cpu")


@pytest.mark.parametrize("sharded", [False, True], ids=["replicated", "sharded"])
def test_a_pool_from_prefill_to_decode(ranks: ProcessRanks, sharded: bool) -> None:
    """What each call writes is read by the next ones, on every rank."""
    for attended, expected in ranks.run(programs.prefill_and_decode, sharded):
        torch.testing.assert_close(attended, expected)


@pytest.mark.parametrize("cache", ["striped", "sharded"])
def test_queries_split_by_heads(ranks: ProcessRanks, cache: str) -> None:
    case = AttentionCase(MIXED, heads=2 * ranks.size, sinks=True, cache=cache)
    plan = case.plan(ranks.size, queries="all")
    split_heads.check(case, plan, ranks.run(programs.attend_by_heads, case, plan, "cpu"), "cpu")


def test_an_all_gather_in_groups_of_heads(ranks: ProcessRanks) -> None:
    case = AttentionCase(MIXED, overlap=2, sinks=True)
    plan = cpattn.plan(case.batch, ranks.size, pad_to=8)
    outputs = ranks.run(programs.attend, case, plan, "all_gather", "cpu")
    case.check(outputs, plan, "all_gather", "cpu")
    whole = AttentionCase(MIXED, overlap=1, sinks=True)
    for (out, lse), (same_out, same_lse) in zip(outputs, ranks.run(programs.attend, whole, plan, "all_gather", "cpu"), strict=True):
        torch.testing.assert_close(out, same_out)
        torch.testing.assert_close(lse, same_lse)


@pytest.mark.parametrize(("peer", "prefix"), [("SGLang's form", 0), ("SGLang's form", 30), ("Ulysses", 0)])
def test_the_peers_that_benchmarks_write_anew_are_exact(ranks: ProcessRanks, peer: str, prefix: int) -> None:
    batch = [(prefix, 41), (0, 12), (prefix, 43)]
    work = Work.random(batch, 0, ranks.size, programs.PEER_HEADS, torch.empty(0))
    out = torch.zeros_like(work.q)
    for rows, tokens in ranks.run(programs.attend_as_peer, peer, batch):
        out[tokens] += rows
    expected, lse = oracle_attention(work.q, work.k, work.v, batch, prefix_k=work.prefix_k, prefix_v=work.prefix_v)
    assert relative_rmse(out, expected) <= single_device_bound(out.dtype, lse)


def test_measured_links_are_the_same_on_all_ranks(ranks: ProcessRanks) -> None:
    first, *others = ranks.run(programs.measured_links)
    assert all(machine == first for machine in others)
    assert first.collectives.gather > 0


def test_group_from_a_device_mesh_axis(ranks: ProcessRanks) -> None:
    case = AttentionCase(MIXED)
    plan = cpattn.plan(case.batch, ranks.size)
    case.check(ranks.run(programs.attend_by_device_mesh, case), plan, "all_gather", "cpu")


def test_subgroup_whose_ranks_are_not_the_global_ones(ranks: ProcessRanks) -> None:
    case = AttentionCase(MIXED)
    outputs = [output for output in ranks.run(programs.attend_in_subgroup, case) if output is not None]
    assert len(outputs) == 2
    case.check(outputs, cpattn.plan(case.batch, 2), "ring", "cpu")


def test_a_process_outside_of_the_group_is_told_so(ranks: ProcessRanks) -> None:
    member, *outsiders = ranks.run(group_programs.outside_of_a_group)
    assert member == "(8, 2)"
    for said in outsiders:
        assert said.startswith("group is GroupMember.NON_GROUP_MEMBER, which torch.distributed.new_group returns to processes that are not")
        assert "only its members make calls: pass the context-parallel group that this process belongs to, or skip the call here" in said


@pytest.mark.parametrize("used", [False, True], ids=["unused", "used"])
def test_a_destroyed_group_is_refused_on_every_rank(ranks: ProcessRanks, used: bool) -> None:
    """And the one that is made in its place works."""
    for *said, works in ranks.run(group_programs.after_it_is_destroyed, used):
        assert all(message.startswith("this process group has been destroyed") and "new_group" in message for message in said)
        assert works == "(8, 2)"


MISTAKES = [
    ("rows", "RowCountError", r"q has \d+ rows, but this rank's metadata has \d+ \(rank \d of \d\); shard the input"),
    ("k rows", "RowCountError", r"k has \d+ rows"),
    ("heads", "HeadCountError", "q has 3 heads, k and v have 2; query heads must be a multiple"),
    ("kv heads", "HeadCountError", "k has 2 heads, v has 1"),
    ("dtype", "TensorMismatchError", r"q is torch.float32, k is torch.bfloat16"),
    ("device", "TensorMismatchError", r"q is on meta, but the metadata is on cpu"),
    ("head_dim", "TensorMismatchError", "q has head_dim 16, k has 8"),
    ("batch axis", "TensorMismatchError", r"q has shape \(1, \d+, 4, 16\); pass a tensor \[rows, heads, head_dim\], without a batch axis"),
    ("no prefix", "PrefixError", "the batch has 5 prefix tokens, but kv_cache is None"),
    ("prefix length", "PrefixError", r"kv_cache.k has 4 rows, but the batch has 5 prefix tokens"),
    ("prefix of v", "PrefixError", r"kv_cache.v has 4 rows, but the batch has 5 prefix tokens"),
    ("prefix heads", "TensorMismatchError", r"kv_cache.k is \(5, 1, 16\).*must be the same"),
    ("strategy", "UnknownNameError", "strategy='star' is unknown; choose one of 'auto', 'all_gather', 'ring'"),
    ("backend", "UnknownNameError", "backend='flash_attn9' is unknown; choose one of 'auto', "),
    ("feature", "UnsupportedError", "backend='cpu' cannot serve this call: it has no softcap; .*'reference' could"),
    ("window", "OptionError", "window=0; pass the number of keys"),
    ("softcap", "OptionError", "softcap=-1.0; pass a positive number"),
    ("scale", "OptionError", "scale=nan; pass a positive number"),
    ("sinks", "HeadCountError", r"sinks has shape \(3,\), q has 4 heads"),
    ("overlap", "OptionError", "overlap=3; pass a divisor of the 2 KV heads"),
    ("gradient", "UnsupportedError", "q requires a gradient, but cpattn computes the forward pass only"),
    ("table too narrow", "PageTableError", r"kv_cache.page_table has 2 pages of 16 tokens.*but request 0 has 45 with its new ones; widen"),
    ("too few lines", "PageTableError", "kv_cache.page_table has 1 lines, one a request, but the batch has 2 requests"),
    (
        "page that is not there",
        "PageTableError",
        r"kv_cache.page_table\[0, 1\] is 1000, but there are pages 0 to \d+; request 0 needs 3 pages",
    ),
    ("page size", "PageTableError", r"k_pages has \(\d+, 16\) pages of tokens, v_pages \(\d+, 8\); they must agree"),
    ("pass_q over whole pages", "UnsupportedError", "strategy='pass_q' cannot serve this call: it moves no keys.*shard the cache"),
    ("whole prefix of a sharded plan", "PrefixError", "the plan has prefix_shards, but kv_cache is a PackedKV"),
    (
        "v_dim",
        "TensorMismatchError",
        r"v is None and v_dim=17; where V is the first columns of K \(MLA\), v_dim says how many: from 1 to 16",
    ),
    ("group size", "GroupError", r"the group has \d ranks, but the plan has cp_size=\d"),
    ("group rank", "GroupError", r"this process is rank \d of the group, but the metadata is that of cp_rank \d"),
]


@pytest.mark.parametrize(("mistake", "kind", "message"), MISTAKES, ids=[mistake for mistake, _, _ in MISTAKES])
def test_mistake_raises_on_every_rank_before_anything_is_sent(ranks: ProcessRanks, mistake: str, kind: str, message: str) -> None:
    for error, text in ranks.run(programs.make_mistake, mistake, list(range(ranks.size)), False):
        assert error == kind
        with pytest.raises(cpattn.CPError, match=message):
            raise cpattn.CPError(text)


@pytest.mark.parametrize(("mistake", "kind", "message"), MISTAKES, ids=[mistake for mistake, _, _ in MISTAKES])
def test_mistake_on_one_rank_raises_on_all_with_check(ranks: ProcessRanks, mistake: str, kind: str, message: str) -> None:
    results = ranks.run(programs.make_mistake, mistake, [1], True)
    for rank, (error, text) in enumerate(results):
        assert error == kind
        with pytest.raises(cpattn.CPError, match=message if rank == 1 else f"rank 1 refused this call: {message}"):
            raise cpattn.CPError(text)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("other batch", r"the ranks disagree on the plan: ranks? 0.*: Plan\(.* [0-9a-f]{32}; rank 1: Plan\(.* [0-9a-f]{32}; build the"),
        ("other scale", r"the ranks disagree on the arguments: ranks? 0.*scale=0.25.*; rank 1: .*scale=0.125"),
        ("other strategy", r"the ranks disagree on the arguments: .*strategy=all_gather.*rank 1: strategy=ring"),
        ("other shards", "the ranks disagree on the plan: "),
        ("other cache", r"the ranks disagree on the arguments: .*cache=PackedKV; rank 1: .*cache=PagedKV"),
        ("other heads", r"the ranks disagree on the arguments: .*4/2 heads of 16/16.*rank 1: .*4/1 heads"),
    ],
)
def test_disagreement_names_the_ranks(ranks: ProcessRanks, mistake: str, message: str) -> None:
    for error, text in ranks.run(programs.make_mistake, mistake, [1], True):
        assert error == "DisagreementError"
        with pytest.raises(cpattn.CPError, match=message):
            raise cpattn.CPError(text)


def test_an_error_that_is_not_ours_reaches_all_ranks_too(ranks: ProcessRanks) -> None:
    for rank, (error, text) in enumerate(ranks.run(programs.make_mistake, "foreign error", [1], True)):
        assert (error, text) == ("RuntimeError", "no class") if rank == 1 else error == "DisagreementError" and "no class" in text


def test_unshard_with_metadata_of_another_plan(ranks: ProcessRanks) -> None:
    for text in ranks.run(programs.unshard_of_another_plan):
        assert "the ranks disagree on the plan" in text


def test_a_rank_that_dies_between_two_calls_makes_the_others_raise() -> None:
    """In the midst of a call, and in a ring: test_gloo_failures.py."""
    timeout = 5.0
    with ProcessRanks(3, timeout=timeout) as ranks:
        outcomes = ranks.outcomes(programs.die_in_the_middle, "all_gather")
    assert outcomes[1] == (False, "the process died with exit code 7")
    for rank in (0, 2):
        done, (error, seconds) = outcomes[rank]
        assert done
        assert error != "nothing"
        assert seconds < 2 * timeout
