"""Small integer tables, from numpy to a device in one copy that the host does not wait for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

IntArray: TypeAlias = npt.NDArray[np.int64]
Int32Array: TypeAlias = npt.NDArray[np.int32]
# What is sent to a device.
Table: TypeAlias = "IntArray | Int32Array"

T = TypeVar("T")

# Up to so many numbers runs are expanded in numpy, which takes it a nanosecond each. On a GPU it takes eight launches, of 5 us of the
# host each, whatever there is.
MOST_ON_HOST = 2**16

# Each table begins on a 16-byte boundary, so that kernels may load it with vector instructions.
_ALIGN = 4


class DeviceTables:
    """Named 1-D tables as int32 on a device: views of one buffer, filled by one copy.

    On CUDA the copy goes through pinned memory and is ordered with the current stream, so nothing waits for it.
    """

    # Tables made under inference_mode could not be used outside of it later.
    @torch.inference_mode(False)
    def __init__(self, tables: Mapping[str, Table], device: torch.device) -> None:
        self._sizes = []
        for table in tables.values():
            self._sizes += [len(table), -len(table) % _ALIGN]
        on_host = self._packed(tables, device)
        self._buffer = on_host if device.type == "cpu" else on_host.to(device, non_blocking=True)
        # Every other piece is what fills a table up to its boundary.
        self._views = dict(zip(tables, self._buffer.split_with_sizes(self._sizes)[::2], strict=True))

    def __getitem__(self, name: str) -> Tensor:
        return self._views[name]

    def copy_(self, tables: Mapping[str, Table]) -> None:
        """Puts tables of the same sizes in the place of these."""
        self._buffer.copy_(self._packed(tables, self._buffer.device), non_blocking=True)

    def are_like(self, tables: Mapping[str, Table]) -> bool:
        """Whether these could be put there."""
        return [len(table) for table in tables.values()] == self._sizes[::2]

    def _packed(self, tables: Mapping[str, Table], device: torch.device) -> Tensor:
        on_host = torch.empty(sum(self._sizes), dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda")
        packed = on_host.numpy()
        offset = 0
        for table, size, filling in zip(tables.values(), self._sizes[::2], self._sizes[1::2], strict=True):
            packed[offset : offset + size] = table
            offset += size + filling
        return on_host


def expand_runs_on_host(first: IntArray, lengths: IntArray, total: int, step: int = 1) -> Int32Array:
    """Concatenates the runs first[i], first[i] + step, ... of lengths[i]: ``[total]``; total = lengths.sum().

    In numpy, which works on the calling thread: torch would wake its thread pool for it, which costs milliseconds
    where cores are busy.

    >>> expand_runs_on_host(np.array([7, 0]), np.array([2, 3]), 5)
    array([7, 8, 0, 1, 2], dtype=int32)

    Args:
        step: 1 or 0.
    """
    # Where a run begins in the result is subtracted, so that one arange serves all runs.
    shift = first + lengths - lengths.cumsum() if step else first
    expanded: Int32Array = shift.astype(np.int32).repeat(lengths)
    if step:
        expanded += np.arange(total, dtype=np.int32)
    return expanded


def expand_runs_on_device(first: Tensor, lengths: Tensor, total: int, step: int = 1) -> Tensor:
    """The same where the tables lie, without waiting for the device."""
    shift = first + lengths - lengths.cumsum(0) if step else first
    # output_size spares the synchronisation that reading the total back would be.
    expanded = torch.repeat_interleave(shift.to(torch.int32), lengths, output_size=total)
    return expanded.add_(torch.arange(total, dtype=torch.int32, device=first.device)) if step else expanded


def are_expanded_on_host(total: int, device: torch.device) -> bool:
    """Whether so many numbers are sent as they are, and not expanded on the device."""
    return device.type == "cpu" or total <= MOST_ON_HOST


@dataclass(frozen=True)
class Unsent(Generic[T]):
    """Tables that are not on a device yet, and what is made of them there. Several may be sent in one copy.

    >>> Unsent({"a": np.array([3, 1])}, lambda tables: tables["a"]).sent(torch.device("cpu"))
    tensor([3, 1], dtype=torch.int32)
    """

    tables: Mapping[str, Table]
    finish: Callable[[Mapping[str, Tensor]], T]

    def sent(self, device: torch.device) -> T:
        """By itself."""
        (made,) = SentTogether([self], device).made([self])
        return made  # type: ignore[no-any-return]


class SentTogether:
    """Several that went to the device in one copy."""

    def __init__(self, parts: Sequence[Unsent[Any]], device: torch.device) -> None:
        self._tables = DeviceTables(self._named(parts), device)

    def copy_(self, parts: Sequence[Unsent[Any]]) -> bool:
        """Puts others there, if they are of the same sizes. Returns whether they are."""
        tables = self._named(parts)
        if not self._tables.are_like(tables):
            return False
        self._tables.copy_(tables)
        return True

    def made(self, parts: Sequence[Unsent[Any]]) -> list[Any]:
        """What each of those becomes that are there."""
        return [part.finish({name: self._tables[f"{number} {name}"] for name in part.tables}) for number, part in enumerate(parts)]

    @staticmethod
    def _named(parts: Sequence[Unsent[Any]]) -> dict[str, Table]:
        return {f"{number} {name}": table for number, part in enumerate(parts) for name, table in part.tables.items()}


def send(tables: Sequence[Table], device: torch.device) -> tuple[Tensor, ...]:
    """int32 on the device, in one copy.

    >>> send([np.array([3, 1]), np.array([2])], torch.device("cpu"))
    (tensor([3, 1], dtype=torch.int32), tensor([2], dtype=torch.int32))
    """
    return unsent(tables).sent(device)


def unsent(tables: Sequence[Table]) -> Unsent[tuple[Tensor, ...]]:
    """The same before they are sent."""
    return Unsent({str(i): table for i, table in enumerate(tables)}, lambda sent: tuple(sent.values()))


def expand_all(
    runs: Mapping[str, tuple[IntArray, IntArray]],
    device: torch.device,
    repeated: Collection[str] = (),
    size: int | None = None,
    fill: int = -1,
) -> dict[str, Tensor]:
    """Each ``(first, lengths)`` expanded, int32 on the device, which gets all of them in one copy.

    >>> expand_all({"rows": (np.array([7, 0]), np.array([2, 3]))}, torch.device("cpu"), size=6)
    {'rows': tensor([ 7,  8,  0,  1,  2, -1], dtype=torch.int32)}

    Args:
        repeated: names of those whose runs are of one number each, as with a step of 0.
        size: how long each is to be, filled with ``fill`` after its runs; if None, no longer than those.
    """
    return unsent_runs(runs, device, repeated, size, fill).sent(device)


def unsent_runs(
    runs: Mapping[str, tuple[IntArray, IntArray]],
    device: torch.device,
    repeated: Collection[str] = (),
    size: int | None = None,
    fill: int = -1,
) -> Unsent[dict[str, Tensor]]:
    """The same before they are sent."""
    totals = {name: (int(lengths.sum()), int(name not in repeated)) for name, (_, lengths) in runs.items()}
    missing = {name: 0 if size is None else size - total for name, (total, _) in totals.items()}
    if are_expanded_on_host(sum(total + missing[name] for name, (total, _) in totals.items()), device):
        on_host = {name: expand_runs_on_host(*runs[name], *total) for name, total in totals.items()}
        on_host = {name: np.append(run, np.full(missing[name], fill, np.int32)) if missing[name] else run for name, run in on_host.items()}
        return Unsent(on_host, dict)

    def expanded(sent: Mapping[str, Tensor]) -> dict[str, Tensor]:
        on_device = {name: expand_runs_on_device(sent[f"{name} 0"], sent[f"{name} 1"], *total) for name, total in totals.items()}
        return {name: torch.cat([run, run.new_full((missing[name],), fill)]) if missing[name] else run for name, run in on_device.items()}

    return Unsent({f"{name} {half}": column for name, columns in runs.items() for half, column in enumerate(columns)}, expanded)


def exclusive_cumsum(lengths: IntArray) -> IntArray:
    """Where each of consecutive runs begins."""
    begins: IntArray = lengths.cumsum() - lengths
    return begins
