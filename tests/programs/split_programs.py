"""What one rank does with a group that is split: over threads, gloo and NCCL alike."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from inputs.cases import AttentionCase
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import cpattn
from cpattn.call.arguments import StrategyChoice
from programs.failed_calls import Faults, attend_with_faults

# Not in ascending order of anything, and of all the group sizes that tests use.
SPLITS: dict[int, list[tuple[int, ...]]] = {
    1: [(1, 1)],
    2: [(2, 1), (1, 2)],
    3: [(3,)],
    4: [(2, 2), (4, 1)],
    6: [(2, 3), (3, 2), (2, 1, 3)],
}


def use_axes(group: cpattn.Transport, sizes: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> list[dict[str, list[int]]]:
    """For each axis, in which order the group's ranks came through each collective, twice, and the bytes that were sent."""
    seen = []
    for part in group.split(*sizes):
        before = part.bytes_sent
        for turn in range(2):
            own = torch.tensor([group.rank], dtype=dtype, device=device) + turn
            gathered, exchanged, shifted = own.new_empty(part.size), own.new_empty(part.size, 2), own.new_empty(1)
            works = [
                part.all_gather(gathered, own),
                part.all_to_all(exchanged, torch.stack([own.expand(part.size), own.new_tensor(range(part.size))], dim=1)),
            ]
            if part.size > 1:
                works.append(part.shift(shifted, own, by=-1))
            for work in works:
                work.wait()
            assert exchanged[:, 1].tolist() == [part.rank] * part.size
        seen.append(
            {
                "gathered": (gathered.cpu() - 1).int().tolist(),
                "exchanged": (exchanged[:, 0].cpu() - 1).int().tolist(),
                "shifted": (shifted.cpu() - 1).int().tolist() if part.size > 1 else [],
                "sent": [(part.bytes_sent - before) // own.element_size()],
            }
        )
    return seen


def check_axes(size: int, sizes: tuple[int, ...], results: list[list[dict[str, list[int]]]]) -> None:
    grid = torch.arange(size).view(sizes)
    for rank, axes in enumerate(results):
        place = [int(x) for x in torch.nonzero(grid == rank)[0]]
        for axis, seen in enumerate(axes):
            line = grid[tuple(slice(None) if n == axis else x for n, x in enumerate(place))].tolist()
            assert seen["gathered"] == seen["exchanged"] == line
            n = len(line)
            assert seen["shifted"] == ([line[(line.index(rank) + 1) % n]] if n > 1 else [])
            assert seen["sent"] == [2 * ((n - 1) + 2 * (n - 1) + (n > 1))]


def send_in_one_part_alone(device: torch.device) -> list[int]:
    """The first that is sent over a group: three rows from the first rank to that of its part in the other half. Ranks of other parts
    have nothing for anybody."""
    world: Any = dist.new_group()
    part = cpattn.transport(world, kind="collectives").split(2, dist.get_world_size() // 2)[0]
    is_sender, is_receiver = dist.get_rank() == 0, dist.get_rank() == dist.get_world_size() // 2
    x = torch.arange(3 * is_sender, device=device)
    out = torch.zeros(3 * is_receiver, dtype=x.dtype, device=device)
    transfer = part.prepare_uneven_all_to_all(out, x, [len(out), 0], [0, len(x)])
    assert transfer is not None
    part.start(transfer).wait()
    seen: list[int] = out.tolist()
    dist.destroy_process_group(world)
    return seen


def reduce_scatter(group: cpattn.Transport, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, int]:
    """This rank's sum, twice over the same memory, and the bytes of one time."""
    xs = reduce_scatter_inputs(group.size, dtype)
    x, out = torch.empty_like(xs[0], device=device), torch.empty(5, 3, dtype=dtype, device=device)
    transfer = group.prepare_reduce_scatter(out, x)
    for turn in (xs[0], xs[group.rank]):
        x.copy_(turn)
        before = group.bytes_sent
        group.start(transfer).wait()
    return out.cpu(), group.bytes_sent - before


def reduce_scatter_inputs(size: int, dtype: torch.dtype) -> list[Tensor]:
    """Every rank's, with sums that depend on the order in which they are made."""
    generator = torch.Generator().manual_seed(size)
    return [(torch.randn(size, 5, 3, generator=generator, dtype=torch.float64) * 10.0 ** (3 - rank)).to(dtype) for rank in range(size)]


def reduce_scatter_sums(size: int, dtype: torch.dtype) -> list[Tensor]:
    """What each rank should get: added up rank after rank, and rounded once."""
    total, *others = (x.to(dtype if dtype == torch.float64 else torch.float32) for x in reduce_scatter_inputs(size, dtype))
    for x in others:
        total = total + x
    return list(total.to(dtype))


def attend_along_axes(group: cpattn.Transport, sizes: tuple[int, ...], cases: list[AttentionCase], strategy: str) -> list[Any]:
    """A call over each axis and over the whole, all checked; the last case is the whole's."""
    parts = [*group.split(*sizes), group]
    return [
        case.on_rank(case.plan(part.size), part.rank, part, strategy, "cpu", check=True) for case, part in zip(cases, parts, strict=True)
    ]


def bytes_across_groups(group: cpattn.Transport, case: AttentionCase, partition: Any, strategy: Any) -> tuple[int, int, int]:
    """What this rank receives in a call from ranks that are not in its group of ``strategy.within``; all that it sends; and all that it
    receives."""
    across: list[int] = []
    received: list[int] = []
    exchange = group._exchange  # type: ignore[attr-defined]

    def watched(send: dict[int, Tensor], receive: dict[int, Tensor]) -> Any:
        across.extend(x.nbytes for source, x in receive.items() if source // strategy.within != group.rank // strategy.within)
        received.extend(x.nbytes for source, x in receive.items() if source != group.rank)
        return exchange(send, receive)

    group._exchange = watched  # type: ignore[attr-defined]
    meta = case.plan(group.size, partition=partition).metadata(group.rank)
    q, k, v = (cpattn.shard(x, meta) for x in (case.q, case.k, case.v))
    before = group.bytes_sent
    cpattn.cp_attention(q, k, v, meta, group=group, kv_cache=case.prefix, strategy=strategy, backend="reference", window=case.window)
    del group._exchange  # type: ignore[attr-defined]
    return sum(across), group.bytes_sent - before, sum(received)


def cut_once(batch: Any, cp_size: int) -> cpattn.Chunks:
    """The first request goes to the first rank and the last one, a half each; others whole to one rank after another."""
    half = int(batch[0, 1]) // 2
    cut = [(0, 0, half, 0), (0, half, int(batch[0, 1]) - half, cp_size - 1)]
    whole = [(n, 0, int(extend), n % cp_size) for n, (_, extend) in enumerate(batch) if n]
    return cpattn.Chunks(*torch.tensor([*cut, *whole]).T.numpy())


def fail_along_an_axis(
    group: cpattn.Transport, sizes: tuple[int, ...], case: AttentionCase, faults: Faults, strategy: str
) -> tuple[Any, Any, Any]:
    """A call over the last axis that fails on some of the group's ranks; one more over it, and one over the whole."""
    part = group.split(*sizes)[-1]
    lines = {part.rank: faults.lines[group.rank]} if group.rank in faults.lines else {}
    first = attend_with_faults(case, case.plan(part.size), part, part.rank, strategy, "cpu", Faults(lines, faults.make))
    second = case.on_rank(case.plan(part.size), part.rank, part, strategy, "cpu", check=True)
    return first, second, case.on_rank(case.plan(group.size), group.rank, group, strategy, "cpu", check=True)


def reduce_scatter_as_torch_does(dtype: torch.dtype) -> Tensor:
    """Over the default group, on the GPU that is this rank's."""
    x = reduce_scatter_inputs(dist.get_world_size(), dtype)[dist.get_rank()].cuda()
    out = torch.empty_like(x[0])
    dist.reduce_scatter_tensor(out, x.view(-1, 3))
    return out.cpu()


def replay_along_an_axis(sizes: tuple[int, ...]) -> list[list[float]]:
    """A sum along the last axis that a CUDA graph has captured, from transfers that were prepared before."""
    part = cpattn.transport().split(*sizes)[-1]
    x, out = torch.ones(part.size, 3, device="cuda", dtype=torch.bfloat16), torch.zeros(3, device="cuda", dtype=torch.bfloat16)
    with part.arena.noting() as blocks:
        transfer = part.prepare_reduce_scatter(out, x)
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        part.start(transfer).wait()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            part.arena.keep_for_graph(blocks)
            part.start(transfer).wait()
    del transfer, blocks
    cpattn.release(part)
    # What was freed would be given out again, and written.
    others = [torch.full((1 << 10,), 7, device="cuda", dtype=torch.uint8) for _ in range(100)]
    part.buffer("reduce_scatter received", (1 << 12,), torch.uint8, x.device).fill_(7)
    seen = []
    for turn in range(1, 4):
        x.fill_(turn)
        graph.replay()
        torch.cuda.synchronize()
        seen.append(out.tolist())
    del others
    return seen


def group_of(size: int) -> Any:
    """The last ``size`` ranks of the world, backwards in it where they are all; every rank makes it, and outsiders get None."""
    world = dist.get_world_size()
    group: Any = dist.group.WORLD if size == world else dist.new_group(list(range(world - size, world)))
    return group if dist.get_rank() >= world - size else None


def in_group(size: int, program: Any, *arguments: Any) -> Any:
    """``program(transport, *arguments)`` on the members of :func:`group_of`."""
    group = group_of(size)
    return None if group is None else program(cpattn.transport(group), *arguments)


def attend_over_a_mesh(shape: tuple[int, int], case: AttentionCase, strategy: StrategyChoice) -> tuple[Tensor, Tensor] | None:
    """Of the last ranks of the world, as a mesh of two axes; None of the others."""
    first = dist.get_world_size() - shape[0] * shape[1]
    mesh = DeviceMesh("cpu", torch.arange(first, dist.get_world_size()).view(shape), mesh_dim_names=("outer", "inner"))
    if mesh.get_coordinate() is None:
        return None
    group: Any = mesh
    assert cpattn.transport(group) is cpattn.transport(group)
    return case.on_rank(case.plan(shape[0] * shape[1]), dist.get_rank() - first, group, strategy, "cpu", check=True)
