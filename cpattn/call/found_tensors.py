"""Where the tensors that a call launches over come from, so that another call finds its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor


class View(NamedTuple):
    """A part of a tensor.

    Attributes:
        place: of the tensor among all.
        begin: how many elements after its begin the view begins.
        dtype: of the view, of as many bytes as the tensor's: fp8 is moved as bytes.
    """

    place: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    begin: int
    dtype: torch.dtype


class Place(NamedTuple):
    """Where a tensor is found: in which group, None for constants, whether among views of it, and there."""

    group: int | None
    is_view: bool
    number: int

    @property
    def is_whole(self) -> bool:
        """Whether it is a tensor of a group as it is."""
        return self.group is not None and not self.is_view


class _Source(NamedTuple):
    """A tensor of a group."""

    begin: int
    end: int
    place: Place
    itemsize: int


class FoundTensors:
    """Where tensors are found, in an order in which a call can have them: those that are there before its first step, views of these,
    constants; and then of each step what it makes, and views of that.

    Args:
        groups: what is there before the first step, and what each step makes.

    Attributes:
        constants: tensors that are no part of any of these.
    """

    def __init__(self, groups: Sequence[Sequence[Tensor | None]]) -> None:
        self._sizes = [len(group) for group in groups]
        places = [(x, Place(i, False, j)) for i, group in enumerate(groups) for j, x in enumerate(group) if x is not None]
        # By layout, as torch gives whoever asks for memory another object than it gives a mode. What a step returns of what it is given
        # was there before.
        self._by_layout = {_layout(x): place for x, place in reversed(places)}
        self._by_id: dict[int, Place | None] = {}
        self._sources = [_Source(*address_range(x), place, x.itemsize) for x, place in places]
        self._views: list[dict[View, int]] = [{} for _ in groups]
        self._begins: dict[tuple[int | None, bool], int] = {}
        self.constants: list[Tensor] = []

    def find(self, x: Tensor) -> Place | None:
        """None where it is not known what it is a part of."""
        if id(x) not in self._by_id:
            self._by_id[id(x)] = self._by_layout.get(_layout(x)) or self._found(x)
        return self._by_id[id(x)]

    def _found(self, x: Tensor) -> Place | None:
        begin, end = address_range(x)
        met = [source for source in self._sources if begin < source.end and source.begin < end]
        if met:
            return self._part(x, met)
        # Nothing of a layer's tensor would keep all of it alive.
        self.constants.append(x if x.numel() else torch.empty_like(x))
        return Place(None, False, len(self.constants) - 1)

    def _part(self, x: Tensor, met: Sequence[_Source]) -> Place | None:
        """Of one of these, whose memory it meets. Others may lie in between, as queries, keys and values that were computed together do."""
        begin, end = address_range(x)
        sources = [source for source in met if source.begin <= begin and end <= source.end]
        if len(sources) > 1:
            sources = [source for source in sources if source.begin == begin]
        if not sources or sources[0].itemsize != x.itemsize:
            return None
        group, _, number = sources[0].place
        assert group is not None
        view = View(number, tuple(x.shape), x.stride(), (begin - sources[0].begin) // x.itemsize, x.dtype)
        return Place(group, True, self._views[group].setdefault(view, len(self._views[group])))

    def put_in_order(self) -> None:
        """To be called once all have been found."""
        at = 0
        for i, (size, views) in enumerate(zip(self._sizes, self._views, strict=True)):
            self._begins[i, False], at = at, at + size
            self._begins[i, True], at = at, at + len(views)
            if i == 0:
                self._begins[None, False], at = at, at + len(self.constants)

    def views(self, group: int) -> tuple[View, ...]:
        """Those of a group's tensors."""
        return tuple(view._replace(place=self._begins[group, False] + view.place) for view in self._views[group])

    def picker(self, places: Sequence[Place | None]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
        """What picks these of all tensors in their order."""
        at = [self._begins[place.group, place.is_view] + place.number for place in places if place is not None]
        return itemgetter(*at) if len(at) > 1 else lambda tensors: tuple(tensors[i] for i in at)


def add_views(tensors: list[Any], views: Sequence[View]) -> None:
    """Puts views of some of these tensors behind them."""
    for place, size, stride, begin, dtype in views:
        x = tensors[place]
        if x.dtype != dtype:
            x = x.view(dtype)
        tensors.append(x.as_strided(size, stride, x.storage_offset() + begin))


def address_range(x: Tensor) -> tuple[int, int]:
    """The addresses of its memory: the first, and that after the last."""
    begin = x.data_ptr()
    if not x.numel():
        return begin, begin
    return begin, begin + x.itemsize * (1 + sum((length - 1) * stride for length, stride in zip(x.shape, x.stride(), strict=True)))


def _layout(x: Tensor) -> tuple[Any, ...]:
    return x.data_ptr(), x.shape, x.stride(), x.dtype
