"""Arena: the memory that one transport's messages lie in, kept from call to call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol
from weakref import WeakSet, ref

import torch
from torch import Tensor

from cpattn.current import is_capturing
from cpattn.transports.group_state import GroupState

# A graph may outlive whoever captured it, the transport and its group, and the memory that it replays over must not be freed.
_of_graphs: dict[int, Tensor] = {}


class Owner(Protocol):
    """What an arena needs of its transport."""

    state: GroupState

    def allocate(self, nbytes: int, device: torch.device) -> Tensor: ...


class KeepsViews(Protocol):
    """Who keeps views of an arena's memory from one call to the next."""

    def memory_changed(self) -> None:
        """Messages no longer lie where views say: forget them, as they would keep that memory alive."""


class _View(NamedTuple):
    """What was last made of a block."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    tensor: Tensor


class Arena:
    """Named blocks of memory on any device. Each grows when more is asked of it, and is never smaller again until :meth:`release`.

    Whoever keeps views of it from one call to the next asks to be told when messages no longer lie in that memory, and says
    what a CUDA graph captures::

        with arena.noting() as blocks:
            message = arena.buffer("message", (1024, 64), torch.bfloat16, device)
        arena.tell_of_changes(self)  # calls self.memory_changed(), which forgets the message
        ...
        if torch.cuda.is_current_stream_capturing():
            arena.keep_for_graph(blocks)

    Args:
        owner: the transport.
        whole: of a part of a group, the arena of the whole: whoever notes its blocks or keeps views of them is told of those of parts, too.

    Attributes:
        call_captures: whether a CUDA graph captures the call that is under way; None between calls.
    """

    def __init__(self, owner: Owner, whole: Arena | None = None) -> None:
        self.call_captures: bool | None = None
        # Without the cycle a transport is freed as soon as nobody holds it.
        self._owner = ref(owner)
        self._blocks: dict[tuple[str, torch.device], Tensor] = {}
        self._views: dict[tuple[str, torch.device], _View] = {}
        # The lists of those who are noting, the innermost last.
        self._noted: list[list[Tensor]] = [] if whole is None else whole._noted
        self._keep_views: WeakSet[KeepsViews] = WeakSet() if whole is None else whole._keep_views

    def buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Uninitialised memory of that shape, kept under ``name`` and given again to whoever asks for that name.

        What a CUDA graph has captured is never freed, even where a larger batch has since needed more.
        """
        key = name, device
        last = self._views.get(key)
        if last is not None and last.shape == shape and last.dtype == dtype and not self._watches(device):
            return last.tensor
        # Memory made under inference_mode could not be written outside of it.
        with torch.inference_mode(False):
            nbytes = dtype.itemsize
            for length in shape:
                nbytes *= length
            view = self._block(key, nbytes)[:nbytes].view(dtype).view(shape)
        self._views[key] = _View(shape, dtype, view)
        return view

    def _block(self, key: tuple[str, torch.device], nbytes: int) -> Tensor:
        block = self._blocks.get(key)
        if block is None or len(block) < nbytes:
            owner = self._owner()
            if owner is None:
                raise RuntimeError("this arena's transport is gone")
            # A little more than asked for, so that slowly growing batches do not allocate at every step.
            larger = owner.allocate(nbytes + nbytes // 8, key[1])
            if block is not None:
                self._forget_views()
                owner.state.keep_until_done(block)
            block = self._blocks[key] = larger
        if self._captures(key[1]):
            self.keep_for_graph([block])
        for noted in self._noted:
            if not any(block is x for x in noted):
                noted.append(block)
        return block

    @contextmanager
    def noting(self) -> Iterator[list[Tensor]]:
        """Collects the blocks that are handed out meanwhile, each once, for :meth:`keep_for_graph`."""
        blocks: list[Tensor] = []
        self._noted.append(blocks)
        try:
            yield blocks
        finally:
            self._noted.pop()

    def keep_for_graph(self, blocks: Iterable[Tensor]) -> None:
        """Has blocks that a CUDA graph captures never be freed. Of what is asked for while a graph captures it is done anyway."""
        _of_graphs.update((id(block), block) for block in blocks)

    def tell_of_changes(self, keeper: KeepsViews) -> None:
        """Has it called whenever memory is replaced or released, as long as it lives."""
        self._keep_views.add(keeper)

    def blocks(self) -> list[Tensor]:
        """All the memory that it holds, each block as uint8 ``[nbytes]``."""
        return list(self._blocks.values())

    def release(self) -> None:
        """Frees the blocks that no CUDA graph has captured; whoever asks for a buffer next has it made anew."""
        owner = self._owner()
        # Another rank of this process may be in a call meanwhile, and ask for one more.
        for block in self.blocks():
            if owner is not None:
                owner.state.keep_until_done(block)
        self._forget_views()
        self._blocks.clear()

    def _forget_views(self) -> None:
        """Of what is about to be replaced: they would keep it alive."""
        self._views.clear()
        for keeper in list(self._keep_views):
            keeper.memory_changed()

    def _watches(self, device: torch.device) -> bool:
        """Whether somebody has to know every block that is handed out now."""
        return bool(self._noted) or self._captures(device)

    def _captures(self, device: torch.device) -> bool:
        """Whether a CUDA graph captures; within a call it was asked as it began, as asking takes the host half a microsecond."""
        return is_capturing(device) if self.call_captures is None else self.call_captures
