"""Parts of groups of real processes over gloo, also where the group is only a part of the world."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from inputs.cases import AttentionCase
from programs import split_programs as programs
from programs.failed_calls import Faults, check_partly_failed
from references.needed_by_hand import Needed
from torch.distributed.device_mesh import DeviceMesh

import cpattn
from cpattn.exchange.schedule import bytes_sent
from cpattn.metadata.united import united_layout
from cpattn.testing import ProcessRanks

CPU = torch.device("cpu")
WORLD = 6
GIVEN_UP = "this group cannot be used any more"


@pytest.fixture(scope="module")
def ranks() -> Iterator[ProcessRanks]:
    """One world for all sizes: smaller groups are its last ranks."""
    with ProcessRanks(WORLD, timeout=60) as started:
        yield started


@pytest.mark.parametrize(("size", "sizes"), [(size, sizes) for size, splits in programs.SPLITS.items() for sizes in splits], ids=str)
def test_collectives_along_each_axis(ranks: ProcessRanks, size: int, sizes: tuple[int, ...]) -> None:
    results = ranks.run(programs.in_group, size, programs.use_axes, sizes, CPU, torch.float32)
    assert results[: WORLD - size] == [None] * (WORLD - size)
    programs.check_axes(size, sizes, results[WORLD - size :])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [2, 3, 6])
def test_reduce_scatter_has_the_bits_of_any_other_transport(ranks: ProcessRanks, size: int, dtype: torch.dtype) -> None:
    results = ranks.run(programs.in_group, size, programs.reduce_scatter, CPU, dtype)[WORLD - size :]
    for (out, sent), want in zip(results, programs.reduce_scatter_sums(size, dtype), strict=True):
        assert torch.equal(out, want)
        assert sent == (size - 1) * want.nbytes


@pytest.mark.parametrize("strategy", ["all_gather", "pass_q_ring"])
def test_attention_along_each_axis(ranks: ProcessRanks, strategy: str) -> None:
    """Of four ranks in a world of six."""
    cases = [AttentionCase([(0, 40), (12, 23)], seed=n) for n in range(3)]
    results = ranks.run(programs.in_group, 4, programs.attend_along_axes, (2, 2), cases, strategy)[2:]
    lines: list[list[list[int]]] = [[[0, 2], [1, 3]], [[0, 1], [2, 3]], [[0, 1, 2, 3]]]
    for n, (case, parts) in enumerate(zip(cases, lines, strict=True)):
        for members in parts:
            case.check([results[rank][n] for rank in members], case.plan(len(members)), strategy, "cpu")


@pytest.mark.parametrize(
    ("strategy", "cache"),
    [(cpattn.hybrid(2, "ring"), "own pages"), (cpattn.hybrid(2, "all_gather"), "own packed"), (cpattn.two_level(2), "paged")],
    ids=str,
)
def test_two_levels_over_a_mesh_of_two_axes(ranks: ProcessRanks, strategy: Any, cache: str) -> None:
    """Of four ranks in a world of six."""
    case = AttentionCase([(30, 77), (0, 41), (0, 2)], cache=cache, within=2, sinks=True)
    results = ranks.run(programs.attend_over_a_mesh, (2, 2), case, strategy)
    outputs = [result for result in results if result is not None]
    assert len(outputs) == 4
    case.check(outputs, case.plan(4), strategy, "cpu")


@pytest.mark.parametrize("strategy", [cpattn.hybrid(2, "ring"), cpattn.hybrid(3, "all_gather")], ids=str)
def test_groups_that_divide_heads_get_what_they_need(ranks: ProcessRanks, strategy: Any) -> None:
    """In bytes: the first group sends and the last one receives; of three the one between does neither."""
    case = AttentionCase([(0, 40), *[(3, 9)] * 20], kv_heads=4)
    plan = case.plan(WORLD, partition=programs.cut_once)
    needed = Needed.of(united_layout(plan, strategy.within), None)
    assert needed.keys.nonzero() == (np.array([0]), np.array([WORLD // strategy.within - 1]))
    results = ranks.run(programs.in_group, WORLD, programs.bytes_across_groups, case, programs.cut_once, strategy)
    received, sent, _ = zip(*results, strict=True)
    assert list(received) == needed.received_by_heads(case, strategy.within)
    assert list(sent) == bytes_sent(strategy.schedule(case.problem(plan), plan)).tolist()


def test_parts_that_have_nothing_to_send(ranks: ProcessRanks) -> None:
    """Over NCCL, whose first transfer waits for all ranks, in tests/gpu/test_nccl.py."""
    assert ranks.run(programs.send_in_one_part_alone, CPU) == [[0, 1, 2] if rank == WORLD // 2 else [] for rank in range(WORLD)]


def test_a_mesh_of_two_axes_is_all_of_its_ranks(ranks: ProcessRanks) -> None:
    assert all(all(identities) for identities in ranks.run(_mesh_identities))


def _mesh_identities() -> list[bool]:
    world, rank = cpattn.transport(), dist.get_rank()
    whole: Any = DeviceMesh("cpu", torch.arange(WORLD).view(2, 3))
    turned: Any = DeviceMesh("cpu", torch.arange(WORLD).view(3, 2).T)
    places = cpattn.transport(turned)
    deeper: Any = DeviceMesh("cpu", torch.arange(WORLD).view(1, 2, 3))
    with pytest.raises(cpattn.GroupError, match=r"a device mesh of 3 axes .*; pass the context-parallel axes alone, one or two"):
        cpattn.transport(deeper)
    with pytest.raises(cpattn.GroupError, match="a device mesh that this process is not in"):
        cpattn.transport(DeviceMesh("cpu", torch.tensor([[(rank + 1) % WORLD]]), _init_backend=False))
    cpattn.release(turned)
    return [
        cpattn.transport(whole) is world,
        # Whatever the ranks of a mesh are, they are laid out as it has them, and share the world's state.
        places.rank == turned.mesh.flatten().tolist().index(rank),
        places is cpattn.transport(turned) and places.state is world.state,
    ]


@pytest.mark.parametrize("line", [0, 60])
def test_a_rank_that_raises_in_a_part(ranks: ProcessRanks, line: int) -> None:
    case = AttentionCase([(0, 40), (12, 23)])
    arguments = (2, 3), case, Faults({4: line}), "ring"
    results = ranks.run(programs.in_group, WORLD, programs.fail_along_an_axis, *arguments)
    for members in ([0, 1, 2], [3, 4, 5]):
        check_partly_failed(case, case.plan(3), "ring", [results[rank][0] for rank in members])
        case.check([results[rank][1] for rank in members], case.plan(3), "ring", "cpu")
    case.check([result[2] for result in results], case.plan(WORLD), "ring", "cpu")


def _identities() -> list[bool]:
    world = cpattn.transport()
    mesh = DeviceMesh("cpu", torch.arange(WORLD).view(2, 3), mesh_dim_names=("dp", "cp"))
    axis = cpattn.transport(mesh["cp"])
    groups_before = len(dist.distributed_c10d._world.pg_names)
    parts = world.split(2, 3)
    return [
        cpattn.transport() is world,
        cpattn.transport(dist.group.WORLD) is world and cpattn.transport(world) is world,
        cpattn.transport(world, kind="collectives") is world is cpattn.transport(dist.group.WORLD, kind="collectives"),
        # Another kind is another transport, over the same group and in the same state.
        cpattn.transport(world, kind="peer_memory") is cpattn.transport(dist.group.WORLD, kind="peer_memory") is not world,
        cpattn.transport(world, kind="peer_memory").state is world.state,
        world.split(2, 3) == parts,
        axis.size == 3 and axis.part == () and cpattn.transport(mesh["cp"].get_group()) is axis,
        # So is one of the axis.
        cpattn.transport(mesh["cp"], kind="peer_memory") is cpattn.transport(mesh["cp"].get_group(), kind="peer_memory") is not axis,
        # The mesh's axis and the world's part have the same ranks, and each its own messages.
        axis is not parts[1] and axis.rank == parts[1].rank,
        # torch's own groups, and so its timeouts, are as they were.
        len(dist.distributed_c10d._world.pg_names) == groups_before,
    ]


def test_one_transport_for_each_group(ranks: ProcessRanks) -> None:
    assert ranks.run(_identities) == [[True] * 10] * WORLD


def _with_unlike_memberships() -> list[float]:
    """Ranks that are in different numbers of groups, as in pipelines. torch names a group that only its members make after that
    number: those of parts would not find each other."""
    dist.new_group([0, 4])
    part = cpattn.transport().split(3, 2)[1]
    out = torch.empty(2)
    part.all_gather(out, torch.tensor([float(dist.get_rank())])).wait()
    return out.tolist()


def test_ranks_in_different_numbers_of_groups(ranks: ProcessRanks) -> None:
    assert ranks.run(_with_unlike_memberships) == [[rank // 2 * 2, rank // 2 * 2 + 1] for rank in range(WORLD)]


def _unshard(transport: cpattn.Transport) -> None:
    meta = cpattn.build_metadata([(0, 12)], transport.size, transport.rank)
    cpattn.unshard(torch.zeros(meta.rows, 1), meta, group=transport)


def _said(call: Callable[[], object]) -> str:
    try:
        call()
    except cpattn.GroupError as error:
        return str(error)
    return "right"


def _after_the_group_is_destroyed() -> list[str]:
    group: Any = dist.new_group()
    whole = cpattn.transport(group)
    outer, inner = whole.split(2, 3)
    inner.all_gather(torch.empty(3), torch.zeros(1)).wait()
    dist.destroy_process_group(group)
    said = [_said(partial(_unshard, part)) for part in (outer, inner)]
    said += [_said(partial(part.split, 1, part.size)) for part in (whole, inner)]
    another: Any = dist.new_group()
    part = cpattn.transport(another).split(2, 3)[1]
    out = torch.empty(3)
    part.all_gather(out, torch.tensor([float(part.rank)])).wait()
    return [*said, str(out.tolist())]


def test_parts_end_with_their_group(ranks: ProcessRanks) -> None:
    for *said, works in ranks.run(_after_the_group_is_destroyed):
        assert len(said) == 4
        assert all(message.startswith("this process group has been destroyed") for message in said)
        assert works == "[0.0, 1.0, 2.0]"


def test_a_rank_that_is_gone_gives_up_its_part_and_the_whole() -> None:
    """Those of the other part go on until they need it."""
    with ProcessRanks(4, timeout=3) as few:
        outcomes = few.outcomes(_go_on_without_rank_3)
    assert not outcomes[3][0]
    assert outcomes[0] == (True, ["right", GIVEN_UP, GIVEN_UP])
    assert outcomes[1] == (True, ["right", GIVEN_UP, GIVEN_UP])
    assert outcomes[2] == (True, [GIVEN_UP] * 3)


def _go_on_without_rank_3() -> list[str]:
    whole = cpattn.transport()
    part = whole.split(2, 2)[1]
    if whole.rank == 3:
        raise SystemExit(1)
    return [_said(partial(_unshard, transport)).split(":")[0] for transport in (part, whole, part)]
