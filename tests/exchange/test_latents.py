"""Latents that are expanded to keys and values where they are attended to: the prefill of multi-head latent attention."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from devices.peers_on_host import let_read
from inputs.latent_cases import LatentCase
from torch import Tensor

import cpattn
from cpattn import expansion
from cpattn.attention import expanded_keys
from cpattn.byte_sizes import in_words
from cpattn.exchange.registry import find_strategy
from cpattn.moves.wide_copy import copy_wide_
from cpattn.problem import Problem
from cpattn.testing import relative_rmse, run_loopback

BATCH = [(0, 19), (35, 6), (9, 0), (23, 1)]
# Six heads of BATCH are then expanded in groups of one or two.
FEW_BYTES = 20_000


@pytest.fixture
def in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expansion, "MOST_BYTES", FEW_BYTES)


@pytest.mark.usefixtures("in_groups")
@pytest.mark.parametrize(
    ("strategy", "cache", "cp_size"),
    [
        ("all_gather", "packed", 2),
        ("all_gather", "packed", 5),
        ("all_gather", "paged", 3),
        (cpattn.two_level(2), "packed", 4),
        (cpattn.two_level(2), "paged", 4),
        ("ring", "packed", 3),
        ("ring", "paged", 2),
        ("ring", "sharded", 3),
        ("ring", "striped", 2),
        ("pass_q", "packed", 3),
        ("pass_q", "sharded", 2),
        ("pass_q", "striped", 3),
        ("pass_q_ring", "sharded", 3),
        ("pass_q_ring", "striped", 3),
    ],
    ids=str,
)
def test_as_the_oracle_says(strategy: Any, cache: str, cp_size: int) -> None:
    case = LatentCase(BATCH, cache=cache)
    case.check_loopback(case.plan(cp_size), strategy, "cpu")


@pytest.mark.parametrize("cache", ["packed", "paged"])
def test_over_the_memory_of_peers(cache: str) -> None:
    """Latents that a rank reads for itself are all there before they are expanded."""
    case = LatentCase(BATCH, cache=cache)
    plan = case.plan(3)

    def program(group: cpattn.Transport) -> tuple[Tensor, Tensor]:
        read = let_read(group)
        result = case.on_rank(plan, group.rank, group, "all_gather", "cpu")
        assert sum(sum(rows.take_read()) for rows in read) > 0
        return result

    case.check(run_loopback(program, 3), plan, "all_gather", "cpu")


@pytest.mark.usefixtures("in_groups")
@pytest.mark.parametrize(("strategy", "cache"), [("all_gather", "paged"), ("ring", "packed"), ("all_gather", "striped")])
def test_with_a_window_and_a_softcap_and_sinks(strategy: str, cache: str) -> None:
    case = LatentCase(BATCH, cache=cache, window=11, softcap=5.0, sinks=True)
    case.check_loopback(case.plan(3), strategy, "reference")


@pytest.mark.usefixtures("in_groups")
@pytest.mark.parametrize("seed", range(4))
def test_random_batches(seed: int) -> None:
    rng = np.random.default_rng(seed)
    batch = [(int(rng.integers(40)) * int(rng.integers(2)), int(rng.integers(30)) * int(rng.integers(3) > 0)) for _ in range(4)]
    strategy, cache = [("all_gather", "packed"), ("all_gather", "paged"), ("ring", "packed"), ("auto", "sharded")][seed]
    case, partition = LatentCase(batch, cache=cache, seed=seed), ["zigzag", "whole"][seed % 2]
    plan = case.plan(int(rng.choice([2, 3, 5])), partition=partition, pad_to=4)
    outputs = run_loopback(lambda c: case.on_rank(plan, c.rank, c, strategy, "cpu"), plan.cp_size)
    case.check(outputs, plan, "ring" if strategy == "auto" else strategy, "cpu")


@pytest.mark.parametrize("batch", [[], [(7, 0)], [(0, 2)]], ids=str)
def test_little_or_nothing(batch: list[tuple[int, int]]) -> None:
    case = LatentCase(batch)
    plan = case.plan(5)
    for out, lse in run_loopback(lambda c: case.on_rank(plan, c.rank, c, "all_gather", "cpu"), 5):
        torch.testing.assert_close(out.double(), case.expected[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lse.double(), case.expected[1], rtol=1e-5, atol=1e-5)


def test_a_bucket_of_new_tokens() -> None:
    case = LatentCase([(0, 19), (0, 6)])
    plan = case.plan(2)
    bucket = cpattn.Bucket(max_requests=4, max_rows=plan.rows + 3, max_chunks=8)
    outputs = run_loopback(
        lambda c: case.on_rank(plan, c.rank, c, "all_gather", "reference", meta=plan.metadata(c.rank, bucket=bucket)), plan.cp_size
    )
    case.check(outputs, plan, "all_gather", "reference")


def test_the_shapes_of_deepseek_v3() -> None:
    """bf16: what is rounded besides is each expanded number, whose error goes into scores and results."""
    case = LatentCase([(5, 9)], 128, 1, 192, 128, torch.bfloat16, rank=512, nope=128)
    plan = case.plan(2)
    out, _ = run_loopback(lambda c: case.on_rank(plan, c.rank, c, "all_gather", "cpu"), 2)[0]
    own, _ = case.single_device_rmse("cpu")
    assert relative_rmse(out, case.expected[0]) <= 1.05 * own
    # Scores are of size 1, and each is off by about as much as a key is.
    assert own <= 2 * torch.finfo(torch.bfloat16).eps


def test_chunked_prefill_then_absorbed_decode() -> None:
    """Pages hold the latents, for both forms."""
    case = LatentCase([(0, 40)])
    pages = torch.full((4, 16, 1, case.latent_dim), torch.nan)
    cache = cpattn.PagedKV(pages, None, torch.tensor([[2, 0, 3]], dtype=torch.int32))
    for done, new in ((0, 17), (17, 15), (32, 8)):
        plan = cpattn.plan([(done, new)], 2)
        q, latent = case.q[done : done + new], case.k[done : done + new]

        def program(group: Any, plan: cpattn.Plan = plan, q: Tensor = q, latent: Tensor = latent) -> tuple[Tensor, Tensor]:
            meta, mine = plan.metadata(group.rank), pages.clone()
            own = cpattn.PagedKV(mine, None, cache.page_table)
            q, latent = cpattn.shard(q, meta), cpattn.shard(latent, meta)
            out = cpattn.cp_attention(q, latent, None, meta, group=group, v_dim=12, kv_cache=own, expand=case.expand)
            return cpattn.unshard(out, meta, group=group), mine

        (out, written), (_, others) = run_loopback(program, 2)
        torch.testing.assert_close(out.double(), case.expected[0][done : done + new], rtol=1e-5, atol=1e-6)
        assert torch.equal(written.nan_to_num(7), others.nan_to_num(7))
        pages.copy_(written)
    # The last token again: its query absorbs the weight of the keys, and its result is expanded by that of the values.
    q = case.q[-1:].clone()
    nope, rope = torch.split(q, [case.nope, case.head_dim - case.nope], dim=2)
    absorbed = torch.cat([torch.einsum("thd,hdr->thr", nope, case.weight[:, : case.nope]), rope], dim=2)
    meta = cpattn.build_metadata([(39, 1)], 1, 0)
    scale = case.head_dim**-0.5
    out = cpattn.cp_attention(absorbed, case.k[-1:], None, meta, v_dim=case.rank, kv_cache=cache, scale=scale)
    out = torch.einsum("thr,hdr->thd", out, case.weight[:, case.nope :])
    torch.testing.assert_close(out.double(), case.expected[0][-1:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [torch.tensor([0.02]), torch.full((8, 16, 1), torch.nan)], ids=["head", "token"])
def test_pages_in_fp8(scale: Tensor) -> None:
    """New latents are seen as the pages have them."""
    case = LatentCase([(0, 33)])
    plan = case.plan(2)

    def program(group: Any) -> tuple[Tensor, Tensor]:
        meta = plan.metadata(group.rank)
        pages = torch.zeros(8, 16, 1, case.latent_dim, dtype=torch.float8_e4m3fn)
        cache = cpattn.PagedKV(pages, None, torch.tensor([[5, 2, 7]]), k_scale=scale.clone())
        q, latent = cpattn.shard(case.q, meta), cpattn.shard(case.k, meta)
        out = cpattn.cp_attention(q, latent, None, meta, group=group, v_dim=12, kv_cache=cache, expand=case.expand)
        assert cache.k_scale is not None
        scales = cache.k_scale[..., None] if cache.scales == "token" else cache.k_scale
        stored = (pages.float() * scales)[[5, 2, 7]].flatten(0, 1)[:33]
        return cpattn.unshard(out, meta, group=group), stored

    for out, stored in run_loopback(program, 2):
        case.k, case.__dict__["expected"] = stored, None
        del case.__dict__["expected"]
        torch.testing.assert_close(out.double(), case.expected[0], rtol=1e-4, atol=1e-5)


def test_the_latent_travels_once() -> None:
    """To the byte, and as the schedule says."""
    case = LatentCase([(0, 40)])
    plan = case.plan(2)
    sent = run_loopback(lambda c: case.on_rank(plan, c.rank, c, "all_gather", "cpu") and c.bytes_sent, 2)
    unsharded = plan.rows * case.heads * (12 + 1) * 4
    assert {nbytes - unsharded for nbytes in sent} == {plan.rows * case.latent_dim * 4}
    (hop,) = find_strategy("all_gather").schedule(case.problem(plan), plan)
    assert set(hop.sent.tolist()) == {plan.rows * case.latent_dim * 4}


def test_one_group_is_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    case = LatentCase([(0, 40)])
    asked: list[slice] = []
    held: list[weakref.ref[Tensor]] = []
    most = 0

    # Three groups of two heads.
    monkeypatch.setattr(expansion, "MOST_BYTES", 40 * (16 + 12) * 4 * 2)

    def expand(latent: Tensor, heads: slice) -> tuple[Tensor, Tensor]:
        nonlocal most
        assert latent.shape == (40, 1, case.latent_dim)
        k, v = case.expand(latent, heads)
        held.append(weakref.ref(k))
        asked.append(heads)
        most = max(most, sum(one() is not None for one in held))
        return k, v

    meta = case.plan(1).metadata(0)
    out = cpattn.cp_attention(case.q, case.k, None, meta, v_dim=12, expand=expand)
    torch.testing.assert_close(out.double(), case.expected[0], rtol=1e-5, atol=1e-6)
    heads = [head for group in asked for head in range(case.heads)[group]]
    assert heads == list(range(case.heads))
    assert len(asked) == 3
    # A GPU has the next one as well.
    assert most == 1


def test_layers_with_functions_of_their_own_share_a_prepared_call() -> None:
    case, other = LatentCase([(0, 9)]), LatentCase([(0, 9)], seed=3)
    meta = case.plan(1).metadata(0)
    prepared = cpattn.prepare(case.q, case.k, None, meta, v_dim=12, expand=case.expand)
    for layer in (case, other):
        out = prepared(layer.q, layer.k, None, expand=layer.expand)
        assert isinstance(out, Tensor)
        assert torch.equal(out, cpattn.cp_attention(layer.q, layer.k, None, meta, v_dim=12, expand=layer.expand))
        torch.testing.assert_close(out.double(), layer.expected[0], rtol=1e-5, atol=1e-6)
    with pytest.raises(cpattn.TensorMismatchError, match="expand is not given, but this call was prepared with one"):
        prepared(case.q, case.k, None)
    # A layer that passes no function is refused before anything is sent, as the first one would be.
    with pytest.raises(cpattn.CPError, match="expand is no function"):
        prepared(case.q, case.k, None, expand=3)  # type: ignore[arg-type]
    with pytest.raises(cpattn.OptionError, match="expand=3; pass a function"):
        cpattn.cp_attention(case.q, case.k, None, meta, v_dim=12, expand=3)  # type: ignore[call-overload]


WRONG: dict[str, tuple[Any, str]] = {
    "k of all heads": (lambda k, v: (k.repeat(1, 2, 1), v), r"returned k of shape \(9, 12, 16\), but it must be .* = \(9, 6, 16\)"),
    "v as wide as k": (lambda k, v: (k, k), r"returned v of shape \(9, 6, 16\), but it must be \[rows, heads, v_dim\] = \(9, 6, 12\)"),
    "rows missing": (lambda k, v: (k[1:], v[1:]), r"returned k of shape \(8, 6, 16\)"),
    "another dtype": (lambda k, v: (k, v.double()), r"returned v in torch.float64 on cpu, but the latent is torch.float32 on cpu"),
    "k alone": (lambda k, v: k, r"expand\(latent \(9, 1, 30\), heads 0:6\) returned Tensor; it must return two tensors"),
    "nothing": (lambda k, v: (None, None), r"returned NoneType, NoneType; it must return two tensors, \(k, v\) of those heads"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_a_function_returns_is_checked(name: str) -> None:
    change, message = WRONG[name]
    case = LatentCase([(0, 9)])
    meta = case.plan(1).metadata(0)
    with pytest.raises(cpattn.TensorMismatchError, match=message):
        cpattn.cp_attention(case.q, case.k, None, meta, v_dim=12, expand=lambda latent, heads: change(*case.expand(latent, heads)))


def test_a_function_that_raises_on_one_rank_harms_no_other() -> None:
    case = LatentCase([(0, 40)])
    plan = case.plan(3)

    def fails(latent: Tensor, heads: slice) -> tuple[Tensor, Tensor]:
        raise MemoryError("no memory for k")

    def program(group: Any) -> tuple[Tensor, Tensor]:
        meta = plan.metadata(group.rank)
        q, latent = cpattn.shard(case.q, meta), cpattn.shard(case.k, meta)

        def call(expand: Any) -> Tensor:
            return cpattn.cp_attention(q, latent, None, meta, group=group, v_dim=12, expand=expand, strategy="ring")

        if group.rank == 1:
            with pytest.raises(MemoryError, match="no memory for k"):
                call(fails)
        else:
            call(case.expand)
        return cpattn.unshard(call(case.expand), meta, group=group), call(case.expand)

    for out, _ in run_loopback(program, 3):
        torch.testing.assert_close(out.double(), case.expected[0], rtol=1e-5, atol=1e-6)


def test_weights_may_require_a_gradient() -> None:
    case = LatentCase([(0, 9)])
    weight = torch.nn.Parameter(case.weight)

    def expand(latent: Tensor, heads: slice) -> tuple[Tensor, Tensor]:
        return cpattn.latent_expansion(weight * 1.0, 12)(latent, heads)

    out = cpattn.cp_attention(case.q, case.k, None, case.plan(1).metadata(0), v_dim=12, expand=expand)
    assert not out.requires_grad
    torch.testing.assert_close(out.double(), case.expected[0], rtol=1e-5, atol=1e-6)


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no function": ({"expand": 3}, cpattn.OptionError, r"expand=3; pass a function of \(latent \[n, 1, L\], heads: slice\)"),
    "a v": ({"v": torch.zeros(9, 1, 30)}, cpattn.TensorMismatchError, "v is given beside expand; .* pass v=None"),
    "no v_dim": ({"v_dim": None}, cpattn.TensorMismatchError, "v_dim=None; with expand it says how wide the values are"),
    "heads": (
        {"k": torch.zeros(9, 2, 15)},
        cpattn.HeadCountError,
        r"k has 2 of 15; with expand k is a latent .* pass it as \[rows, 1, L\]",
    ),
    "a dtype": ({"k": torch.zeros(9, 1, 30).double()}, cpattn.TensorMismatchError, "q is torch.float32, the latent k is torch.float64"),
    "overlap": ({"overlap": 2}, cpattn.OptionError, "overlap=2; a latent has one head"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    change, error, message = REFUSED[name]
    case = LatentCase([(0, 9)])
    given: dict[str, Any] = {"q": case.q, "k": case.k, "v": None, "v_dim": 12, "expand": case.expand} | change
    with pytest.raises(error, match=message):
        cpattn.cp_attention(meta=case.plan(1).metadata(0), **given)


@pytest.mark.parametrize("strategy", ["ulysses", cpattn.hybrid(2, "ring")], ids=str)
def test_ranks_that_divide_heads_have_one_latent(strategy: Any) -> None:
    case = LatentCase([(0, 8)])
    meta = case.plan(2).metadata(0)
    group = cpattn.LoopbackGroup(2).transport(0)
    q, latent = cpattn.shard(case.q, meta), cpattn.shard(case.k, meta)
    with pytest.raises(cpattn.UnsupportedError, match="it divides heads, and a latent has one"):
        cpattn.cp_attention(q, latent, None, meta, group=group, v_dim=12, expand=case.expand, strategy=strategy)
    assert group.bytes_sent == 0


def test_attend_says_where_to_pass_it() -> None:
    case = LatentCase([(3, 9)], cache="paged")
    plan = case.plan(1)
    given: dict[str, Any] = {"v_dim": 12, "expand": case.expand}
    with pytest.raises(cpattn.OptionError, match="attend has no argument expand: it is for cp_attention and prepare"):
        cpattn.attend(case.q, case.pages(plan, 0).cache, plan.metadata(0), **given)


def test_the_pages_of_a_bucket_are_refused() -> None:
    case = LatentCase([(3, 9)], cache="paged")
    plan = case.plan(1)
    meta = plan.metadata(0, bucket=cpattn.Bucket(max_requests=2, max_rows=16, max_chunks=4))
    cache = case.pages(plan, 0, max_requests=2).cache
    with pytest.raises(cpattn.UnsupportedError, match=r"expand over the pages of a bucket: .* or the absorbed form"):
        cpattn.cp_attention(torch.zeros(16, 6, 16), torch.zeros(16, 1, 30), None, meta, v_dim=12, kv_cache=cache, expand=case.expand)


def test_compiled_graphs_end_before_it() -> None:
    case = LatentCase([(0, 9)])
    meta = case.plan(1).metadata(0)

    def layer(q: Tensor, latent: Tensor) -> Tensor:
        return 2 * cpattn.cp_attention(q, latent + 0.0, None, meta, v_dim=12, expand=case.expand)

    with torch.no_grad():
        torch.compiler.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported, match="there is no expand="):
            torch.compile(layer, backend="eager", fullgraph=True)(case.q, case.k)
        torch.compiler.reset()
        assert torch.equal(torch.compile(layer, backend="eager")(case.q, case.k), layer(case.q, case.k))


def test_explain_says_how_many_heads_at_a_time() -> None:
    case = LatentCase(BATCH)
    plan = case.plan(2)
    meta = plan.metadata(0)
    q, latent = cpattn.shard(case.q, meta), cpattn.shard(case.k, meta)
    explained = cpattn.explain(q, latent, None, meta, v_dim=12, kv_cache=case.prefix, expand=case.expand)
    assert explained["latent"].startswith("30 numbers a token are expanded to 16 and 12 a head, all 6 heads at once, ")
    assert explained["cpu"] == "chosen"


@pytest.mark.parametrize(("strategy", "keys"), [("all_gather", 64), ("ring", 16)])
def test_explain_says_what_a_launch_expands(strategy: str, keys: int) -> None:
    case = LatentCase([(0, 64)])
    meta = case.plan(4).metadata(0)
    q, latent = cpattn.shard(case.q, meta), cpattn.shard(case.k, meta)
    explained = cpattn.explain(q, latent, None, meta, v_dim=12, strategy=strategy, expand=case.expand)
    assert explained["latent"].endswith(f"all 6 heads at once, {in_words(6 * keys * (16 + 12) * 4)} each")


def test_a_problem_says_what_travels_and_what_is_attended_to() -> None:
    problem = Problem(torch.device("cpu"), torch.bfloat16, 8, 128, 128, 192, 128, cache="paged", page_size=64, latent_dim=576)
    assert problem.key_bytes == 576 * 2
    attended = problem.attended
    assert (attended.key_bytes, attended.cache, attended.page_size) == (128 * 320 * 2, None, None)
    assert attended.attended is attended
    # 64k keys take 40 MiB a head, of which six fit.
    assert {heads.stop - heads.start for heads in expansion.head_groups(problem, 65_536)} <= {5, 6}
    assert len(expansion.head_groups(problem, 10**9)) == 128
    assert expansion.head_groups(problem, 0) == [slice(0, 128)]


def test_what_a_latent_is_expanded_with() -> None:
    weight = torch.randn(3, 9, 5)
    with pytest.raises(cpattn.TensorMismatchError, match=r"weight is of shape \(27, 5\), and v_dim=4; pass \[heads, nope \+ v_dim, rank\]"):
        cpattn.latent_expansion(weight.flatten(0, 1), 4)
    with pytest.raises(cpattn.TensorMismatchError, match="v_dim=9; "):
        cpattn.latent_expansion(weight, 9)
    expand = cpattn.latent_expansion(weight, 4)
    with pytest.raises(cpattn.TensorMismatchError, match=r"the latent is \(2, 1, 4\) torch.float32, the weight \(3, 9, 5\) torch.float32"):
        expand(torch.randn(2, 1, 4), slice(0, 3))
    k, v = expand(torch.ones(2, 1, 7), slice(1, 3))
    torch.testing.assert_close(v, weight[1:, 5:].sum(2).expand(2, 2, 4))
    torch.testing.assert_close(k, torch.cat([weight[1:, :5].sum(2), torch.ones(2, 2)], dim=1).expand(2, 2, 7))


@pytest.mark.parametrize(
    ("to", "source"),
    [
        ((4, 3, 64), (4, 1, 64)),
        ((4, 3, 6), (4, 3, 6)),
        ((4, 3, 5), (4, 1, 5)),
        ((0, 3, 8), (0, 1, 8)),
    ],
    ids=str,
)
@pytest.mark.parametrize("begin", [0, 1, 8])
def test_wide_copies(to: tuple[int, ...], source: tuple[int, ...], begin: int) -> None:
    """Whatever of rows and addresses is a multiple of eight bytes."""
    memory, given = torch.zeros(*to[:2], 100, dtype=torch.bfloat16), torch.randn(*source[:2], 100).bfloat16()
    copy_wide_(memory[..., begin : begin + to[2]], given[..., 4 : 4 + source[2]])
    expected = torch.zeros_like(memory)
    expected[..., begin : begin + to[2]] = given[..., 4 : 4 + source[2]]
    assert torch.equal(memory, expected)


class RecordedStream:
    """A stand-in for a CUDA stream: what it is told is written down."""

    def __init__(self, log: list[tuple[Any, ...]], name: str) -> None:
        self.log, self.name, self.device = log, name, torch.device("cpu")

    def wait_stream(self, other: RecordedStream) -> None:
        self.log.append((self.name, "waits for", other.name))

    def wait_event(self, event: tuple[Any, ...]) -> None:
        self.log.append((self.name, "waits for", event))

    def record_event(self) -> tuple[Any, ...]:
        return next(entry for entry in reversed(self.log) if entry[0] == self.name)


@pytest.mark.parametrize("fails", [False, True])
def test_streams_wait_for_each_other(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """Of a GPU: a group is attended to once it is there, and its memory is written again once it has been attended to."""
    log: list[tuple[Any, ...]] = []
    here, beside = RecordedStream(log, "here"), RecordedStream(log, "beside")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: here)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(expanded_keys, "_stream_beside", lambda stream: beside)

    def attend(heads: slice, keys: Any) -> None:
        if fails and heads.start:
            raise MemoryError
        log.append(("here", "attends", heads.start))

    def expand(heads: slice) -> Any:
        log.append(("beside", "expands", heads.start))

    with pytest.raises(MemoryError) if fails else nullcontext():
        expanded_keys._beside([slice(n, n + 1) for n in range(3)], expand, attend)
    assert log[0] == ("beside", "waits for", "here")
    assert log[-1] == ("here", "waits for", "beside")
    for n in range(1 if fails else 3):
        there, attended = ("beside", "expands", n), ("here", "attends", n)
        assert log.index(there) < log.index(("here", "waits for", there)) < log.index(attended)
        # The group after the next may take its memory.
        waited, later = ("beside", "waits for", attended), ("beside", "expands", n + 2)
        assert log.index(attended) < log.index(waited)
        assert later not in log or log.index(waited) < log.index(later)
