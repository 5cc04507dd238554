"""The KV cache of a generation: pages for each layer, made when it first attends, and the forward context that hands them out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cpattn.call.arguments import Arguments
from cpattn.call.forward_context import ForwardContext
from cpattn.device_tables import IntArray
from cpattn.kv_cache import PagedKV
from cpattn.metadata.striped import Striped

# Tokens of a page, and in a sharded cache those that lie on a rank in turn: turns are whole pages then.
PAGE_SIZE = 16


class LayerPages:
    """This rank's pages for all layers of a model. Every request has its own for its longest possible sequence.

    Layers may differ in their heads: each one's pages are made for the first keys that it brings.
    """

    def __init__(self, max_lengths: IntArray, rule: Striped | None, cp_size: int, device: torch.device) -> None:
        held = max_lengths if rule is None else rule.held(max_lengths, cp_size).max(axis=1)
        counts = -(-held // PAGE_SIZE)
        self.num_pages = int(counts.sum())
        first = np.cumsum(counts) - counts
        # What lies beyond a request's own pages is not looked at.
        table = np.minimum(first[:, None] + np.arange(counts.max()), self.num_pages - 1)
        self._table = torch.from_numpy(table).to(device, torch.int32)
        self._pages: dict[int, tuple[Tensor, Tensor]] = {}
        self._caches: dict[int, PagedKV] = {}
        self._step_table = self._table

    @property
    def nbytes(self) -> int:
        """Of the pages of all layers that have attended."""
        return sum(pages.nbytes for both in self._pages.values() for pages in both)

    def select(self, requests: list[int]) -> None:
        """The next steps are about these requests alone."""
        self._step_table = self._table[requests]
        self._caches.clear()

    def of(self, layer: int, k: Tensor, v: Tensor) -> PagedKV:
        """A layer's pages, for the keys ``[rows, Hkv, D]`` and values ``[rows, Hkv, Dv]`` that it brings."""
        cache = self._caches.get(layer)
        if cache is None:
            if layer not in self._pages:
                k_pages, v_pages = (x.new_zeros(self.num_pages, PAGE_SIZE, *x.shape[1:]) for x in (k, v))
                self._pages[layer] = k_pages, v_pages
            cache = self._caches[layer] = PagedKV(*self._pages[layer], self._step_table)
        return cache


@dataclass(eq=False)
class PagedForward(ForwardContext):
    """A forward pass whose n-th attention is over the n-th layer's pages.

    It goes by the order of calls, which compiled graphs keep; layers need no number of their own.

    Attributes:
        pages: of all layers; None for a pass without a cache.
    """

    pages: LayerPages | None = None

    def complete(self, arguments: Arguments) -> Arguments:
        """With the pages of the layer whose turn it is."""
        completed = super().complete(arguments)
        k: Any = completed.k
        v: Any = completed.v
        return completed if self.pages is None else completed._replace(kv_cache=self.pages.of(self.calls, k, v))
