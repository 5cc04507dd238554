"""Memory that views of it outlast: generations, blocks that graphs have captured, and what is freed when."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import cpattn
from cpattn.transports import arena as arena_module

CPU = torch.device("cpu")


@pytest.fixture
def group() -> cpattn.Transport:
    return cpattn.LoopbackGroup(1).transport(0)


@pytest.fixture
def kept_for_graphs(monkeypatch: pytest.MonkeyPatch) -> dict[int, torch.Tensor]:
    kept: dict[int, torch.Tensor] = {}
    monkeypatch.setattr(arena_module, "_of_graphs", kept)
    return kept


def address(block: torch.Tensor) -> int:
    return block.untyped_storage().data_ptr()


class Keeper:
    """Counts how often it was told."""

    def __init__(self) -> None:
        self.told = 0

    def memory_changed(self) -> None:
        self.told += 1


def test_who_keeps_views_is_told_of_growth_and_release_and_of_nothing_else(group: cpattn.Transport) -> None:
    arena, keeper = group.arena, Keeper()
    arena.tell_of_changes(keeper)
    view = arena.buffer("a", (10,), torch.float32, CPU)
    arena.buffer("b", (1000,), torch.float32, CPU)
    assert arena.buffer("a", (10,), torch.float32, CPU) is view
    # Another shape, and a little more: the block has room.
    arena.buffer("a", (5, 2), torch.int32, CPU)
    arena.buffer("a", (11,), torch.float32, CPU)
    arena.buffer("c", (1000,), torch.float32, CPU)
    assert keeper.told == 0
    arena.buffer("a", (1000,), torch.float32, CPU)
    assert keeper.told == 1
    arena.release()
    assert keeper.told == 2
    alive = weakref.ref(keeper)
    del keeper
    assert alive() is None
    arena.release()


def test_memory_that_is_replaced_outlasts_its_views_and_no_more(group: cpattn.Transport) -> None:
    view = group.arena.buffer("a", (10,), torch.float32, CPU).fill_(3.0)
    storage = weakref.ref(group.arena.blocks()[0])
    group.arena.buffer("a", (1000,), torch.float32, CPU)
    assert view.tolist() == [3.0] * 10
    del view
    gc.collect()
    assert storage() is None


def test_memory_is_asked_for_while_it_is_released(group: cpattn.Transport, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by another rank of the process."""
    arena = group.arena
    for name in "ab":
        arena.buffer(name, (10,), torch.float32, CPU)
    monkeypatch.setattr(group.state, "keep_until_done", lambda block: arena.buffer(f"after {address(block)}", (10,), torch.float32, CPU))
    arena.release()
    assert arena.blocks() == []


def test_noting_collects_each_block_once(group: cpattn.Transport) -> None:
    arena = group.arena
    arena.buffer("before", (4,), torch.float32, CPU)

    arena.buffer("b", (8,), torch.float32, CPU)
    with arena.noting() as blocks:
        a = arena.buffer("a", (4,), torch.float32, CPU)
        arena.buffer("a", (4,), torch.float32, CPU)
        with arena.noting() as inner:
            # What was made before is noted all the same.
            b = arena.buffer("b", (8,), torch.float32, CPU)
    arena.buffer("after", (4,), torch.float32, CPU)
    assert [address(x) for x in inner] == [address(b)]
    assert [address(x) for x in blocks] == [address(a), address(b)]


def test_what_is_kept_for_a_graph_is_never_freed(group: cpattn.Transport, kept_for_graphs: dict[int, torch.Tensor]) -> None:
    arena = group.arena
    with arena.noting() as blocks:
        arena.buffer("a", (10,), torch.float32, CPU)
    arena.buffer("b", (10,), torch.float32, CPU)
    captured, other = (weakref.ref(x) for x in arena.blocks())
    arena.keep_for_graph(blocks)
    arena.keep_for_graph(blocks)
    del blocks
    # Neither by growth, nor by a release, nor with the transport.
    arena.buffer("a", (1000,), torch.float32, CPU)
    arena.release()
    del arena, group
    gc.collect()
    assert len(kept_for_graphs) == 1
    assert captured() is not None
    assert other() is None


def test_what_is_asked_for_while_a_graph_captures_is_kept_for_it(group: cpattn.Transport, kept_for_graphs: dict[int, torch.Tensor]) -> None:
    arena = group.arena
    views = {name: arena.buffer(name, (10,), torch.float32, CPU) for name in ("a", "b", "c")}
    arena.call_captures = True
    assert address(arena.buffer("a", (10,), torch.float32, CPU)) == address(views["a"])
    assert address(arena.buffer("c", (5,), torch.float32, CPU)) == address(views["c"])
    assert {address(x) for x in kept_for_graphs.values()} == {address(views["a"]), address(views["c"])}


def test_memory_comes_from_the_transport(group: cpattn.Transport, monkeypatch: pytest.MonkeyPatch) -> None:
    given = torch.zeros(4096, dtype=torch.uint8)
    monkeypatch.setattr(group, "allocate", lambda nbytes, device: given[:nbytes])
    assert address(group.buffer("a", (100,), torch.float32, CPU)) == address(given)
    (part,) = (part for part in cpattn.LoopbackGroup(2).transport(1).split(2, 1)[1:])
    assert part.size == 1
    monkeypatch.setattr(part.whole, "allocate", lambda nbytes, device: given[:nbytes])  # type: ignore[attr-defined]
    assert address(part.buffer("a", (100,), torch.float32, CPU)) == address(given)


def test_a_transport_is_freed_with_its_last_holder(group: cpattn.Transport) -> None:
    """At once: nothing that it holds refers back to it."""
    transport = cpattn.LoopbackGroup(1).transport(0)
    transport.buffer("a", (10,), torch.float32, CPU)
    dead = weakref.ref(transport)
    del transport
    assert dead() is None
