"""What a cache must hold, written down plainly: from position to rank to slot, one token after another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import cpattn


@dataclass(frozen=True)
class CacheForm:
    """What an engine decides on when it starts.

    Attributes:
        owner: "replicated", "computed", or a rule of positions.
        stored: the dtype of pages; scales: of fp8, "token" or "head".
        v_in_k: whether V is the first ``v_head_dim`` columns of K.
    """

    cp_size: int
    owner: str | cpattn.Striped
    num_pages: int
    page_size: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    v_in_k: bool
    stored: torch.dtype
    scales: str | None
    device: str = "cpu"

    @property
    def sharded(self) -> bool:
        return self.owner != "replicated"


class Tokens:
    """Keys and values of tokens by their numbers, which count from 0: as a model gives them, in bf16; as pages hold them; and what that
    means.

    Attributes:
        k, v: ``[n, Hkv, D]``; meant_k, meant_v the same after a way through pages.
        of_heads: scales ``[Hkv]`` of K and V where heads have them.
        stored: K, V, and scales where tokens have them, ``[n, Hkv, ...]`` each; their bits.
    """

    def __init__(self, form: CacheForm, count: int, random: torch.Generator) -> None:
        def normal(head_dim: int) -> Tensor:
            return torch.randn(count, form.kv_heads, head_dim, generator=random)

        def magnitudes(*shape: int) -> Tensor:
            return 2.0 ** torch.randint(-4, 5, shape, generator=random)

        self.of_heads: tuple[Tensor, Tensor] | None = None
        scales: list[Tensor | None] = [None, None]
        k, v = normal(form.head_dim), normal(form.v_head_dim)
        if not form.v_in_k:
            v *= magnitudes(count, form.kv_heads, 1)
        for x in (k, v):
            # Rows of zeros want a scale as well.
            x *= torch.rand(count, form.kv_heads, 1, generator=random) > 0.02
        if form.scales == "head":
            # 448 times the least holds any of these numbers.
            scales = [(1 + torch.rand(form.kv_heads, generator=random)) * most / 448 for most in (8.0, 8.0 * 16)]
            self.of_heads = scales[0], scales[1]  # type: ignore[assignment]
        self.k = k.bfloat16()
        self.v = self.k[..., : form.v_head_dim] if form.v_in_k else v.bfloat16()
        k_numbers, k_scale, self.meant_k = _through_pages(self.k, form, scales[0])
        self.stored = [k_numbers]
        if form.v_in_k:
            v_scale, self.meant_v = None, self.meant_k[..., : form.v_head_dim]
        else:
            v_numbers, v_scale, self.meant_v = _through_pages(self.v, form, scales[1])
            self.stored.append(v_numbers)
        self.stored += [scale for scale in (k_scale, v_scale) if scale is not None and form.scales == "token"]
        # Made on the CPU, alike for all devices.
        for name in ("k", "v", "meant_k", "meant_v"):
            setattr(self, name, getattr(self, name).to(form.device))
        self.stored = [_as_bytes(x).to(form.device) for x in self.stored]
        if self.of_heads is not None:
            self.of_heads = (self.of_heads[0].to(form.device), self.of_heads[1].to(form.device))


def _through_pages(x: Tensor, form: CacheForm, scale: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
    """Stored numbers, their scales, and the numbers in bf16 that these stand for."""
    if form.scales is None:
        return x, None, x
    if scale is None:
        # The largest number of a token and head becomes the largest that fp8 has; where all are 0, the scale is the smallest normal one.
        scale = (x.float().abs().amax(dim=2) / torch.finfo(form.stored).max).clamp(min=torch.finfo(torch.float32).tiny)
    numbers = (x.float() / scale[..., None]).to(form.stored)
    return numbers, scale, (numbers.float() * scale[..., None]).bfloat16()


class CacheModel:
    """What one rank's pages must hold. The same token may be in several requests, as after a fork.

    Attributes:
        tokens: of each request the numbers of its tokens, by position; ranks: which rank holds each.
    """

    def __init__(self, form: CacheForm, rank: int, stored: Sequence[Tensor], pages: Sequence[Tensor]) -> None:
        self.form, self.rank = form, rank
        self.tokens: dict[str, list[int]] = {}
        self.ranks: dict[str, list[int]] = {}
        self._stored, self._pages = stored, [_as_bytes(x) for x in pages]
        self._right = [x.clone() for x in self._pages]

    def admit(self, name: str, parent: str | None = None, length: int = 0) -> None:
        """A request that begins with the first tokens of another, if there is one."""
        self.tokens[name] = self.tokens[parent][:length] if parent else []
        self.ranks[name] = self.ranks[parent][:length] if parent else []

    def extend(self, plan: cpattn.Plan, new: Mapping[str, Sequence[int]]) -> None:
        """A step is planned: these tokens are new in its requests, which are in the order of the plan."""
        for request, (name, numbers) in enumerate(new.items()):
            positions = range(len(self.tokens[name]), len(self.tokens[name]) + len(numbers))
            self.tokens[name] += numbers
            if isinstance(self.form.owner, cpattn.Striped):
                self.ranks[name] += [position // self.form.owner.interleave % self.form.cp_size for position in positions]
            else:
                # Those who compute them, in order; of a replicated cache it does not matter.
                self.ranks[name] += [chunk.rank for chunk in plan.chunks if chunk.request == request for _ in range(chunk.length)]
            assert len(self.tokens[name]) == len(self.ranks[name])

    def cut(self, name: str, length: int) -> None:
        del self.tokens[name][length:], self.ranks[name][length:]

    def release(self, name: str) -> None:
        del self.tokens[name], self.ranks[name]

    def slots(self, name: str, line: Sequence[int]) -> Iterator[tuple[int, tuple[int, int]]]:
        """Of a request's tokens those that this rank holds, each with its page and the place in it; ``line`` are the pages."""
        held = 0
        for token, rank in zip(self.tokens[name], self.ranks[name], strict=True):
            if rank == self.rank or not self.form.sharded:
                yield token, (line[held // self.form.page_size], held % self.form.page_size)
                held += 1

    def slots_of_last(self, new: Mapping[str, Sequence[int]], lines: Mapping[str, Sequence[int]]) -> list[tuple[int, int]]:
        """Where a step's new tokens lie on this rank."""
        last = {number for numbers in new.values() for number in numbers}
        return [slot for name in new for token, slot in self.slots(name, lines[name]) if token in last]

    def clear(self, slots: Sequence[tuple[int, int]]) -> None:
        """A pool has taken a step back that may have written there: that, and what follows in those pages, is zeros."""
        first: dict[int, int] = {}
        for page, place in slots:
            first[page] = min(place, first.get(page, place))
        for page, place in first.items():
            for right in self._right:
                right[page, place:] = 0

    def accept(self, slots: Sequence[tuple[int, int]]) -> None:
        """There may be whatever a step has left that failed: the next tokens come there."""
        for page, place in slots:
            for right, pages in zip(self._right, self._pages, strict=True):
                right[page, place] = pages[page, place]

    def check(self, lines: Mapping[str, Sequence[int]]) -> None:
        """Every page: each token lies in its slot to the bit, no two in one, and all other slots are as they were."""
        tokens: dict[tuple[int, int], int] = {}
        for name, line in lines.items():
            for token, slot in self.slots(name, line):
                assert tokens.setdefault(slot, token) == token, f"{name} has token {token} in {slot}, where {tokens[slot]} is"
        entries = torch.tensor([(page, place, token) for (page, place), token in tokens.items()], dtype=torch.int64)
        page, place, numbers = entries.view(-1, 3).to(self.form.device).unbind(1)
        for pages, right, stored in zip(self._pages, self._right, self._stored, strict=True):
            right[page, place] = stored[numbers]
            wrong = (pages != right).flatten(2).any(dim=2).nonzero().tolist()
            assert not wrong, f"(page, place) {wrong[:8]} of rank {self.rank}; tokens there: {[tokens.get((p, n)) for p, n in wrong[:8]]}"


def _as_bytes(x: Tensor) -> Tensor:
    """With bits instead of numbers, so that NaN is equal to itself; a view."""
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.dtype.itemsize])
