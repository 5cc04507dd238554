"""Calls that launch again what an earlier layer's has launched, against calls that go the long way."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from inputs.cases import AttentionCase
from torch import Tensor
from torch.utils import _python_dispatch as python_dispatch

import cpattn
from cpattn.attention import flash_attn3, flash_attn4, merge
from cpattn.attention.reference import reference_attention
from cpattn.call import prepared
from cpattn.call import relaunch as relaunch_module
from cpattn.call.relaunch import Given, Recorder, Relaunch
from cpattn.moves import moves
from cpattn.noted import launch as step
from cpattn.noted import noting
from cpattn.testing import run_loopback
from cpattn.transports import peer_memory
from cpattn.transports.in_flight import InFlight
from cpattn.transports.peer_loopback import PeerLoopbackTransport
from cpattn.transports.posted import Posted

pytest.importorskip("triton")
from cpattn.kernels import launch


@pytest.fixture
def repeated(monkeypatch: pytest.MonkeyPatch) -> list[Relaunch]:
    """What has been, in order."""
    found: list[Relaunch] = []
    run = Relaunch.run

    def note(relaunch: Relaunch, *given: Any) -> Any:
        found.append(relaunch)
        return run(relaunch, *given)

    monkeypatch.setattr(Relaunch, "run", note)
    return found


@pytest.fixture(autouse=True)
def kernels_everywhere(device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without a GPU all of the library's kernels run in the interpreter, also those that move rows and merge."""
    if device == "cpu":
        backend = replace(cpattn.BACKENDS["triton"], device_types=None, unavailable=lambda: None, refuses=lambda problem: None)
        backend = replace(backend, waits_for_keys=lambda problem: False, reads_in_place=lambda problem: False)
        monkeypatch.setitem(cpattn.BACKENDS, "triton", backend)
        for module in (moves, merge):
            monkeypatch.setattr(module, "has_kernels", lambda device: True)
        moves.moves_for.cache_clear()
        merge.merge_for.cache_clear()
    yield
    moves.moves_for.cache_clear()
    merge.merge_for.cache_clear()


@pytest.fixture
def one_at_a_time(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter works for one thread at a time."""
    if device == "cpu":
        call, lock = launch._Prepared.__call__, threading.RLock()

        def launch_alone(prepared: Any, *tensors: Any) -> None:
            with lock:
                call(prepared, *tensors)

        monkeypatch.setattr(launch._Prepared, "__call__", launch_alone)


BATCH = [(9, 13), (0, 1), (16, 5)]
SMALL: dict[str, Any] = {"batch": BATCH, "heads": 2, "kv_heads": 1, "head_dim": 16, "page_size": 4}
KINDS: dict[str, dict[str, Any]] = {
    "new alone": {"batch": [(0, 13), (0, 1)]},
    "prefixes": {},
    "sinks, softcap and window": {"sinks": True, "softcap": 3.0, "window": 7},
    "half over pages": {"cache": "paged", "dtype": torch.bfloat16},
    "ring over pages": {"cache": "paged", "strategy": "ring"},
    "latent": {"cache": "paged", "v_in_k": True, "head_dim": 32, "v_head_dim": 16},
    "overlap": {"kv_heads": 2, "overlap": 2},
}


@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_what_they_are_alone(kind: str, device: str, repeated: list[Relaunch]) -> None:
    given = SMALL | KINDS[kind]
    strategy = given.pop("strategy", "all_gather")
    cases = [AttentionCase(seed=seed, device=device, **given) for seed in range(4)]
    plan = cases[0].plan(1, pad_to=8)
    meta = plan.metadata(0, device)
    for number, case in enumerate(cases):
        compare(case, plan, meta, None, strategy, f"layer {number}")
    assert len(repeated) >= 2
    assert not any(relaunch.has_transfers for relaunch in repeated)


def compare(
    case: AttentionCase, plan: cpattn.Plan, meta: cpattn.CPMetadata, group: Any, strategy: str, what: str, backend: str = "triton"
) -> None:
    """A layer's result beside that of the same call over metadata of its own."""
    rank = 0 if group is None else group.rank
    result = case.on_rank(plan, rank, group, strategy, backend, meta=meta)
    alone = case.on_rank(plan, rank, group, strategy, backend)
    for mine, theirs in zip(result, alone, strict=True):
        assert torch.equal(mine, theirs), what


EXCHANGES = [
    ("all_gather", "packed", 3),
    ("ring", "packed", 3),
    ("pass_q", "striped", 2),
    ("pass_q_ring", "sharded", 2),
    ("ulysses", "own pages", 2),
]


@pytest.mark.parametrize(("strategy", "cache", "cp_size"), EXCHANGES)
@pytest.mark.usefixtures("one_at_a_time")
def test_transfers_are_started_again(strategy: str, cache: str, cp_size: int, device: str, repeated: list[Relaunch]) -> None:
    heads = {"heads": 2, "kv_heads": 2} if strategy == "ulysses" else {}
    batch = {"batch": [(6, 7), (0, 1), (4, 3)]}
    cases = [AttentionCase(seed=seed, device=device, **(SMALL | batch | {"cache": cache, **heads})) for seed in range(4)]
    plan = cases[0].plan(cp_size)

    def program(group: cpattn.Communicator) -> list[tuple[int, int]]:
        meta, counts = plan.metadata(group.rank, device), [(group.bytes_sent, group.state.calls[()])]
        for case in cases[:3]:
            case.on_rank(plan, group.rank, group, strategy, "triton", meta=meta)
            counts.append((group.bytes_sent, group.state.calls[()]))
        compare(cases[3], plan, meta, group, strategy, "the last layer")
        return [(sent - sent_before, calls - before) for (sent_before, before), (sent, calls) in pairwise(counts)]

    for counts in run_loopback(program, cp_size):
        assert len(set(counts)) == 1, counts
    assert len(repeated) >= cp_size
    assert any(relaunch.has_transfers for relaunch in repeated)


OF_PACKAGES: list[tuple[str, str, int, dict[str, Any]]] = [
    ("prefixes", "all_gather", 1, {}),
    ("sinks", "all_gather", 1, {"sinks": True}),
    ("window over pages", "all_gather", 1, {"cache": "paged", "window": 7}),
    ("groups of heads", "all_gather", 1, {"heads": 4, "kv_heads": 2, "overlap": 2}),
    ("a ring", "ring", 3, {}),
    ("a ring with sinks", "ring", 2, {"sinks": True}),
    ("queries", "pass_q", 2, {"cache": "striped", "page_size": 16}),
    ("queries around a ring", "pass_q_ring", 2, {"cache": "sharded", "page_size": 16}),
    ("heads", "ulysses", 2, {"cache": "own pages", "page_size": 16, "heads": 4, "kv_heads": 2}),
]


@pytest.fixture
def package(request: pytest.FixtureRequest, device: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """One of them. Without a GPU its kernel is the reference, called where the package's is."""
    name: str = request.param
    backend = cpattn.BACKENDS[name]
    if device == "cpu":

        def reference(q: Tensor, keys: Any, spans: Any, options: Any, *given: Any, **options_of_package: Any) -> Any:
            out, lse = reference_attention(q, keys, spans, options, q.dtype)
            if given and isinstance(given[-1], Tensor):
                out = given[-1].copy_(out)
            # Head after head, as packages give it.
            return out, lse.t().contiguous().t()

        if name == "torch_flash":
            pytest.skip("torch has no such kernel without a GPU")
        monkeypatch.setattr(flash_attn3, "find_build", lambda: SimpleNamespace(has=lambda feature: False, takes_out=True))
        monkeypatch.setattr(flash_attn3 if name == "flash_attn3" else flash_attn4, "launch", reference)
        backend = replace(
            backend, device_types=None, unavailable=lambda: None, refuses=lambda problem: None, reads_pages=lambda problem: True
        )
        monkeypatch.setitem(cpattn.BACKENDS, name, backend)
    elif backend.unavailable():
        pytest.skip(f"{name} is not installed")
    return name


# Of the packages a machine without a GPU has none. They differ in sinks, and in whether they write into memory that is there.
WITH_PACKAGES = [
    pytest.param(package, *kind[1:], id=f"{package}, {kind[0]}")
    for package in ("flash_attn4", "flash_attn3", "torch_flash")
    for kind in OF_PACKAGES
    if package == "flash_attn4" or kind[0] in {"prefixes", "sinks", "groups of heads"}
]


@pytest.mark.parametrize(("package", "strategy", "cp_size", "given"), WITH_PACKAGES, indirect=["package"])
@pytest.mark.usefixtures("one_at_a_time")
def test_kernels_of_packages_are_launched_again(
    package: str, strategy: str, cp_size: int, given: dict[str, Any], device: str, repeated: list[Relaunch]
) -> None:
    """As a whole, with what they make."""
    small = SMALL | {"head_dim": 64, "dtype": torch.bfloat16} | given
    cases = [AttentionCase(seed=seed, device=device, **small) for seed in range(4)]
    plan = cases[0].plan(cp_size)

    def program(group: cpattn.Communicator) -> None:
        meta = plan.metadata(group.rank, device)
        for number, case in enumerate(cases):
            compare(case, plan, meta, group, strategy, f"layer {number}", package)

    run_loopback(program, cp_size)
    assert len(repeated) >= 2 * cp_size


@pytest.fixture
def beside_a_prefix(package: str, device: str) -> Callable[[], Tensor]:
    """A call that copies a prefix as well."""
    meta = cpattn.build_metadata([(3, 14)], 1, 0, device=device)
    q, k, v = (torch.randn(14, heads, 64, device=device).bfloat16() for heads in (2, 1, 1))
    prefix = cpattn.PackedKV(*(torch.randn(3, 1, 64, device=device).bfloat16() for _ in range(2)))
    return partial(cpattn.cp_attention, q, k, v, meta, kv_cache=prefix, backend=package, strategy="all_gather")


@pytest.mark.parametrize("package", ["flash_attn4"], indirect=True)
def test_memory_for_what_a_package_makes_is_there_before_launches_send(
    beside_a_prefix: Callable[[], Tensor], repeated: list[Relaunch], monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        beside_a_prefix()

    def full(*given: Any, **options: Any) -> Tensor:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(torch, "empty_strided", full)
    (alone,) = repeated
    # What is given is not looked at before there is memory.
    given = Given(*[torch.empty(0)] * 5)
    alone = alone._replace(views=())
    assert not alone.made
    assert alone.tensors_or_none(given) is not None
    assert alone._replace(posts=[True]).tensors_or_none(given) is None


@pytest.mark.parametrize("package", ["flash_attn4"], indirect=True)
def test_a_package_is_not_launched_again_under_autocast(
    beside_a_prefix: Callable[[], Tensor], device: str, repeated: list[Relaunch]
) -> None:
    """It would see it, and is kept from that otherwise."""
    with torch.autocast(device):
        for _ in range(4):
            beside_a_prefix()
    assert not repeated
    for _ in range(3):
        beside_a_prefix()
    assert repeated


@pytest.mark.parametrize("package", ["flash_attn4"], indirect=True)
def test_a_package_alone_is_called_as_before(package: str, device: str, repeated: list[Relaunch]) -> None:
    """To launch it again would take no less."""
    meta = cpattn.build_metadata([(0, 14)], 1, 0, device=device)
    for _ in range(4):
        q, k, v = (torch.randn(14, heads, 64, device=device).bfloat16() for heads in (2, 1, 1))
        cpattn.cp_attention(q, k, v, meta, backend=package, strategy="all_gather")
    assert not repeated


def test_what_is_too_large_is_let_go_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is recorded of a call is kept alive until it ends: a ring's partial results would be as many as ranks."""
    monkeypatch.setattr(relaunch_module, "_MOST_BESIDE_BYTES", 4)
    with Recorder(4) as recorder:
        x = torch.empty(1)
        alive = weakref.ref(step(partial(torch.add, 1), x))
        was_kept = alive() is not None
        step(partial(torch.add, 1), x)
        is_kept = alive() is not None
    assert (was_kept, is_kept) == (True, False)
    assert recorder.relaunch(Given(x, None, None, None, None), (x, x), cast("Any", "a plan"), [], [], 0) is None


def test_what_sends_is_launched_after_a_step_that_fails() -> None:
    """The others wait for it."""
    sent: list[Tensor] = []
    x = torch.ones(4)

    def make(x: Tensor) -> Tensor:
        if sent:
            raise torch.OutOfMemoryError("no memory")
        return x + 1

    def send(x: Tensor) -> None:
        sent.append(x.clone())

    with Recorder() as recorder:
        made = step(make, x)
        step(send, made)
    again = recorder.relaunch(Given(x, None, None, None, None), (made, x), cast("Any", "a plan"), [], [True], 0)
    assert again is not None
    failures: list[Exception] = []
    again.run([x, None, None, None, None, *[None] * 5], cast("Any", None), failures)
    assert [type(failure) for failure in failures] == [torch.OutOfMemoryError]
    assert len(sent) == 2
    assert sent[1].isnan().all()
    with pytest.raises(torch.OutOfMemoryError):
        again.run([x, *[None] * 9], cast("Any", None))


def layer(device: str, rows: int = 14) -> list[Tensor]:
    return [torch.randn(rows, heads, 16, device=device).bfloat16() for heads in (2, 1, 1)]


def attend(q: Tensor, k: Tensor, v: Tensor, meta: cpattn.CPMetadata) -> Tensor:
    return cpattn.cp_attention(q, k, v, meta, backend="triton", strategy="all_gather")


def test_parts_of_one_tensor(device: str, repeated: list[Relaunch]) -> None:
    meta = cpattn.build_metadata([(0, 13), (0, 1)], 1, 0, device=device)
    for _ in range(4):
        whole = torch.randn(14, 4, 16, device=device, dtype=torch.bfloat16)
        q, k, v = whole[:, :2], whole[:, 2:3], whole[:, 3:]
        out = attend(q, k, v, meta=meta)
        assert torch.equal(out, attend(q.clone(), k.clone(), v.clone(), meta=meta))
    assert repeated


@pytest.mark.parametrize("kind", ["head", "token"])
def test_pages_in_fp8(kind: str, device: str, repeated: list[Relaunch], monkeypatch: pytest.MonkeyPatch) -> None:
    """They are moved as bytes. Scales may be parameters of a model."""
    # What is looked at on the CPU alone takes operations of torch.
    monkeypatch.setattr(prepared, "check_own_contents", lambda *given: None)
    plan = cpattn.plan([(3, 11), (0, 3)], 1)
    meta, table = plan.metadata(0, device), torch.arange(8, dtype=torch.int32, device=device).view(2, 4)
    for _ in range(4):
        q, k, v = layer(device)
        pages = [torch.randn(8, 4, 1, 16, device=device).to(torch.float8_e4m3fn) for _ in range(2)]
        scales = [torch.rand((1,) if kind == "head" else (8, 4, 1), device=device) + 0.1 for _ in range(2)]
        results = []
        for metadata in (meta, plan.metadata(0, device)):
            own = [torch.nn.Parameter(x) if kind == "head" else x.clone() for x in scales]
            cache = cpattn.PagedKV(pages[0].clone(), pages[1].clone(), table, k_scale=own[0], v_scale=own[1])
            out = cpattn.cp_attention(q, k, v, metadata, kv_cache=cache, backend="triton", strategy="all_gather")
            assert cache.v_pages is not None
            results.append([out, *own, *(x.view(torch.uint8) for x in (cache.k_pages, cache.v_pages))])
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(*results, strict=True))
    assert len(repeated) == 2


def test_other_addresses_go_the_long_way(device: str, repeated: list[Relaunch]) -> None:
    """Tensors that begin elsewhere than at multiples of 16 bytes, and K and V that begin at one place."""
    meta = cpattn.build_metadata([(0, 13), (0, 1)], 1, 0, device=device)
    q, k, v = layer(device)
    expected, own = attend(q, k, v, meta=meta), attend(q, k, k.clone(), meta=meta)
    for _ in range(2):
        attend(q, k, v, meta=meta)
    count = len(repeated)
    assert count
    shifted = [torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in (q, k, v)]
    assert torch.equal(attend(shifted[0], shifted[1], shifted[2], meta=meta), expected)
    assert torch.equal(attend(q, k, k, meta=meta), own)
    assert len(repeated) == count
    assert torch.equal(attend(q, k, v, meta=meta), expected)
    assert len(repeated) == count + 1


def test_another_batch_of_a_bucket_is_recorded_anew(device: str, repeated: list[Relaunch]) -> None:
    bucket = cpattn.Bucket(max_requests=3, max_rows=16, max_chunks=6, max_seqlen=64)
    plans = [cpattn.plan(batch, 1) for batch in ([(0, 13), (0, 1)], [(0, 3), (0, 5), (0, 4)], [(0, 16)])]
    meta = plans[0].metadata(0, device, bucket=bucket)
    q, k, v = layer(device, 16)
    held = cpattn.prepare(q, k, v, meta, backend="triton", strategy="all_gather")
    for plan in [*plans, plans[0]]:
        meta.copy_(plan)
        alone = plan.metadata(0, device, bucket=bucket)
        for _ in range(3):
            q, k, v = layer(device, 16)
            out, count = held(q, k, v), len(repeated)
            assert isinstance(out, Tensor)
            assert torch.equal(out, attend(q, k, v, meta=alone))
            assert torch.equal(out, attend(q, k, v, meta=meta))
        assert repeated[-1].plan is plan or len(repeated) > count


def test_released_memory_is_not_used(device: str, repeated: list[Relaunch]) -> None:
    meta = cpattn.plan([(3, 11), (0, 3)], 1).metadata(0, device)
    prefix = cpattn.PackedKV(*(torch.randn(3, 1, 16, device=device).bfloat16() for _ in range(2)))
    results = []
    for call in range(8):
        if call == 4:
            count = len(repeated)
            cpattn.release()
        q, k, v = layer(device)
        options: dict[str, Any] = {"kv_cache": prefix, "backend": "triton", "strategy": "all_gather"}
        out = cpattn.cp_attention(q, k, v, meta, **options)
        results.append(torch.equal(out, cpattn.cp_attention(q, k, v, cpattn.plan([(3, 11), (0, 3)], 1).metadata(0, device), **options)))
        if call == 4:
            assert len(repeated) == count > 0
    assert all(results)


def test_without_memory_a_call_goes_the_long_way(device: str, repeated: list[Relaunch], monkeypatch: pytest.MonkeyPatch) -> None:
    meta = cpattn.build_metadata([(0, 14)], 1, 0, device=device)
    q, k, v = layer(device)
    *_, expected = (attend(q, k, v, meta=meta) for _ in range(3))
    # The last one is that of memory of the host, or of somebody else's allocator.
    failures = [torch.OutOfMemoryError("no memory"), MemoryError(), RuntimeError("no memory")]
    count, empty = len(repeated), torch.empty_strided

    def full(*given: Any, **options: Any) -> Tensor:
        if fails.pop():
            raise failures.pop()
        return empty(*given, **options)

    monkeypatch.setattr(torch, "empty_strided", full)
    while failures:
        fails = [*[False] * 9, True]
        assert torch.equal(attend(q, k, v, meta=meta), expected)
    assert len(repeated) == count


def test_what_a_caller_puts_in_the_place_of_the_kernel_is_called(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody notes what that launches."""
    backend, count = cpattn.BACKENDS["triton"], 0

    def own(q: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
        nonlocal count
        count += 1
        return backend.attend(q, *given)

    monkeypatch.setitem(cpattn.BACKENDS, "triton", replace(backend, attend=cast("Any", own)))
    meta = cpattn.build_metadata([(0, 14)], 1, 0, device=device)
    for _ in range(4):
        q, k, v = layer(device)
        attend(q, k, v, meta=meta)
    assert count == 4


def test_a_batch_that_comes_back_to_its_bucket(device: str, repeated: list[Relaunch]) -> None:
    """After one call over another one, so that what was recorded is there still, over tables that have been refilled twice."""
    bucket = cpattn.Bucket(max_requests=3, max_rows=16, max_chunks=6, max_seqlen=64)
    plan, other = (cpattn.plan(batch, 1) for batch in ([(0, 13), (0, 1)], [(0, 3), (0, 5), (0, 4)]))
    meta = plan.metadata(0, device, bucket=bucket)
    q, k, v = layer(device, 16)
    held = cpattn.prepare(q, k, v, meta, backend="triton", strategy="all_gather")
    for calls, now in ((3, plan), (1, other), (1, plan)):
        meta.copy_(now)
        for _ in range(calls):
            q, k, v = layer(device, 16)
            out, count = held(q, k, v), len(repeated)
            assert isinstance(out, Tensor)
            assert torch.equal(out, attend(q, k, v, meta=now.metadata(0, device, bucket=bucket)))
    assert count == 2


def test_ways_of_ranks_through_shared_memory_are_told_apart_by_none() -> None:
    """With check=True ranks compare whether the last call went through it, also where one of them has launched it again."""
    transport = PeerLoopbackTransport(cpattn.LoopbackGroup(2), 0)
    transport.repeat(0)
    assert not transport.shares_memory


def test_what_is_noted_of_a_copy_does_not_keep_its_transport(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_memory, "_copy_beside", lambda *given: None)
    transport, message, out = PeerLoopbackTransport(cpattn.LoopbackGroup(2), 0), Posted(8), torch.empty(1, 8, dtype=torch.uint8)
    transport._beside = cast("Any", "a stream")
    transport.shared.heap = cast("Any", SimpleNamespace(message_of=lambda *given: out))
    message.board = cast("Any", SimpleNamespace(size=2, offset=0))
    with noting() as steps:
        transport.bring_beside(message, out, 1)
    alive = weakref.ref(transport)
    del transport
    assert alive() is None
    assert len(steps) == 1


@pytest.mark.parametrize("failure", [RuntimeError("no such kernel"), KeyboardInterrupt()])
def test_a_group_whose_launches_fail_is_given_up(failure: BaseException, device: str) -> None:
    """Nobody knows how many messages were sent, if there are any."""

    def fail() -> None:
        raise failure

    for sends in (False, True):
        transport = cpattn.LoopbackGroup(2).transport(0)
        with pytest.raises(type(failure)), InFlight(transport, torch.empty(0, device=device).device) as in_flight:
            in_flight.repeat(fail, 0, sends=sends)
        assert (transport.state.failure is not None) == sends


def test_what_a_recorder_sees() -> None:
    with Recorder() as recorder:
        x = torch.empty(3)
        x[1:].view(2, 1)
        torch.empty(3).copy_(x)
        x.fill_(2)
    others = [recorder.other]
    with recorder:
        x.copy_(x + 1, non_blocking=True)
        x.zero_()
    assert [*others, recorder.other] == [None, "add, copy_, zero_"]


def test_a_copy_under_inference_mode_is_no_view() -> None:
    """There ``to``, ``contiguous`` and ``reshape`` are operations of their own, which say that they return a view."""
    x = torch.ones(2, 3)
    seen = []
    copies: list[Callable[[], Tensor]] = [
        lambda: x.to(torch.float64),
        lambda: x.t().contiguous(),
        lambda: x.t().reshape(-1),
        lambda: x.t().flatten(),
    ]
    for copy in copies:
        with torch.inference_mode(), Recorder() as recorder:
            copy()
        seen.append(recorder.other is not None)
    with torch.inference_mode(), Recorder() as recorder:
        x.to(torch.float32).reshape(3, 2).contiguous().unbind()
    assert [*seen, recorder.other is None] == [True] * 5


def test_a_recorder_leaves_the_compiler_alone() -> None:
    """To be imported for the first call's second layer would take it a second, and other threads' functions are compiled meanwhile."""
    # Threads of other tests may have left it said.
    said = python_dispatch.is_in_torch_dispatch_mode()
    python_dispatch._is_in_torch_dispatch_mode = False
    try:
        with Recorder():
            assert not python_dispatch.is_in_torch_dispatch_mode()
    finally:
        python_dispatch._is_in_torch_dispatch_mode = said
    assert not hasattr(Recorder.__torch_dispatch__, "__wrapped__")
