"""KVPool: pages for those without an engine of their own: which request has which pages, and which are free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cpattn.errors import CPError, PoolFullError
from cpattn.kv_cache import PagedKV
from cpattn.metadata.batch import IntArray
from cpattn.metadata.plan import Plan, plan


@dataclass
class _Request:
    """What the pool knows of a request: the rank that holds each token (rank 0 stands for all where the cache is
    replicated), and the pages of each rank, in order."""

    owners: IntArray
    pages: list[list[int]] = field(default_factory=list)


class KVPool:
    """One rank's pages for all layers, and the bookkeeping of all ranks' pages, which every rank does alike.

    A step of an engine: :meth:`plan` lays out which requests get how many new tokens, and takes the pages for them;
    each layer calls ``cp_attention(..., kv_cache=pool.layer(n, page_table))``, which writes them. A step that the pool is
    too full for raises, on every rank, and changes nothing.

    >>> import cpattn
    >>> pool = cpattn.KVPool(num_pages=8, page_size=4, num_layers=1, kv_heads=2, head_dim=16)
    >>> pool.admit("a")
    >>> pool.plan([("a", 6)]).batch  # a prefill of 6 tokens
    (Request(prefix_len=0, extend_len=6),)
    >>> pool.length("a"), pool.free_pages
    (6, 6)
    >>> pool.fork("a", "b", 5)  # another request begins with the same 5 tokens
    >>> pool.plan([("a", 1), ("b", 3)]).batch  # one decodes, one prefills its rest
    (Request(prefix_len=6, extend_len=1), Request(prefix_len=5, extend_len=3))
    >>> pool.release("a")
    >>> pool.release("b")
    >>> pool.free_pages
    8

    Args:
        num_pages: of this rank; the same on every rank.
        page_size: tokens of a page.
        num_layers, kv_heads, head_dim: of the model.
        v_head_dim: that of K if None; 0 where V is a part of K (MLA).
        dtype, device: of the pages.
        cp_size, cp_rank: of the group.
        sharded: whether each rank holds only the tokens that it owned when they were written, or all of them.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        num_layers: int,
        kv_heads: int,
        head_dim: int,
        v_head_dim: int | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        cp_size: int = 1,
        cp_rank: int = 0,
        sharded: bool = False,
    ) -> None:
        v_head_dim = head_dim if v_head_dim is None else v_head_dim
        shape = (num_layers, num_pages, page_size, kv_heads)
        # Zeros, as kernels that load whole pages multiply what lies after a sequence by a weight of 0.
        self.k_pages = torch.zeros(*shape, head_dim, dtype=dtype, device=device)
        self.v_pages = torch.zeros(*shape, v_head_dim, dtype=dtype, device=device) if v_head_dim else None
        self.page_size = page_size
        self.cp_size = cp_size
        self.cp_rank = cp_rank
        self.sharded = sharded
        self._holders = cp_size if sharded else 1
        self._here = cp_rank if sharded else 0
        # The last is taken first; a page that several requests share is counted as often.
        self._free = [list(range(num_pages))[::-1] for _ in range(self._holders)]
        self._uses: list[Counter[int]] = [Counter() for _ in range(self._holders)]
        self._requests: dict[Hashable, _Request] = {}

    @property
    def free_pages(self) -> int:
        """Pages that are free on the rank that has the fewest."""
        return min(map(len, self._free))

    def length(self, request: Hashable) -> int:
        """Tokens of the request that are in the cache, over all ranks."""
        return len(self._of(request).owners)

    def admit(self, request: Hashable) -> None:
        """A new request without tokens. Raises CPError if there is one of that name."""
        if request in self._requests:
            raise CPError(f"request {request!r} is in the pool already; release it first, or choose another name")
        self._requests[request] = _Request(np.empty(0, dtype=np.int64), [[] for _ in range(self._holders)])

    def fork(self, parent: Hashable, child: Hashable, length: int) -> None:
        """A new request whose first ``length`` tokens are the parent's: whole pages are shared, the rest is copied. Tokens
        that :meth:`plan` has counted but no layer has written yet are not there to be copied: fork between steps.

        Raises PoolFullError if there is no page for the rest, CPError if the parent has fewer tokens; nothing has changed.
        """
        source = self._of(parent)
        if not 0 <= length <= len(source.owners):
            raise CPError(f"request {parent!r} has {len(source.owners)} tokens in the cache, {length} can not be taken from it")
        if child in self._requests:
            raise CPError(f"request {child!r} is in the pool already; release it first, or choose another name")
        owners = source.owners[:length]
        held = np.bincount(owners, minlength=self._holders)
        self._require([int(count) % self.page_size > 0 for count in held], f"the last page of a copy of request {parent!r}")
        pages = []
        for holder, count in enumerate(held.tolist()):
            whole, rest = divmod(count, self.page_size)
            taken = source.pages[holder][:whole]
            self._uses[holder].update(taken)
            if rest:
                taken = [*taken, self._take(holder)]
                if holder == self._here:
                    for x in (self.k_pages, self.v_pages):
                        if x is not None:
                            x[:, taken[-1], :rest] = x[:, source.pages[holder][whole], :rest]
            pages.append(taken)
        self._requests[child] = _Request(owners.copy(), pages)

    def plan(self, extends: Sequence[tuple[Hashable, int]], *, partition: str = "zigzag", pad_to: int = 1) -> Plan:
        """The plan of a step in which each request gets so many new tokens, and the pages to write them to.

        Raises PoolFullError if some rank has too few free pages, CPError for a request that is unknown or named twice;
        nothing has changed.
        """
        names = [name for name, _ in extends]
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise CPError(f"request {twice[0]!r} is in the step twice; give all of its new tokens at once")
        batch = [(self.length(name), extend) for name, extend in extends]
        shards = [np.bincount(self._of(name).owners, minlength=self.cp_size).tolist() for name in names] if self.sharded else None
        planned = plan(batch, self.cp_size, partition=partition, pad_to=pad_to, prefix_shards=shards)
        held = planned.shard_lens + planned.rank_extends if self.sharded else planned.total_lens[:, None]
        needed = [
            [-(-int(held[i, holder]) // self.page_size) - len(self._of(name).pages[holder]) for i, name in enumerate(names)]
            for holder in range(self._holders)
        ]
        self._require([sum(counts) for counts in needed], f"the {planned.num_tokens} new tokens of {len(names)} requests")
        for holder, counts in enumerate(needed):
            for name, count in zip(names, counts, strict=True):
                self._of(name).pages[holder] += [self._take(holder) for _ in range(count)]
        self._append_owners(names, planned)
        return planned

    def release(self, request: Hashable) -> None:
        """Forgets a request; pages that no other one shares are free again."""
        forgotten = self._of(request)
        del self._requests[request]
        for holder, pages in enumerate(forgotten.pages):
            for page in pages:
                self._uses[holder][page] -= 1
                if not self._uses[holder][page]:
                    del self._uses[holder][page]
                    self._free[holder].append(page)

    def page_table(self, requests: Sequence[Hashable], shape: tuple[int, int] | None = None) -> Tensor:
        """int32 ``[len(requests), max_pages]`` on the pages' device: this rank's pages of each; as wide on every rank.

        Args:
            requests: in the order of the plan.
            shape: of the table, where it has to be that of a bucket; lines and pages that are not there are 0. Raises
                CPError if it is too small.
        """
        width = max((len(pages) for name in requests for pages in self._of(name).pages), default=0)
        if shape is not None and (shape[0] < len(requests) or shape[1] < width):
            raise CPError(
                f"a page table of {shape} is too small for {len(requests)} requests of up to {width} pages; choose a larger bucket"
            )
        table = np.zeros(shape or (len(requests), max(width, 1)), dtype=np.int32)
        for line, name in zip(table, requests, strict=False):
            pages = self._of(name).pages[self._here]
            line[: len(pages)] = pages
        return torch.from_numpy(table).to(self.k_pages.device)

    def layer(self, layer: int, page_table: Tensor) -> PagedKV:
        """One layer's pages, as ``kv_cache`` of a step; the page table is made once a step and serves all layers."""
        return PagedKV(self.k_pages[layer], None if self.v_pages is None else self.v_pages[layer], page_table)

    def _of(self, request: Hashable) -> _Request:
        if request not in self._requests:
            raise CPError(f"request {request!r} is not in the pool; admit it first")
        return self._requests[request]

    def _require(self, pages: Sequence[int], what: str) -> None:
        for holder, count in enumerate(pages):
            if count > len(self._free[holder]):
                where = f" on rank {holder}" if self.sharded else ""
                raise PoolFullError(
                    f"{what} need {int(count)} pages of {self.page_size} tokens{where}, but {len(self._free[holder])} are free; release "
                    "requests, or give fewer new tokens"
                )

    def _take(self, holder: int) -> int:
        page = self._free[holder].pop()
        self._uses[holder][page] = 1
        return page

    def _append_owners(self, names: Sequence[Hashable], planned: Plan) -> None:
        new = [np.zeros(extend, dtype=np.int64) for _, extend in planned.batch]
        if self.sharded:
            for chunk in planned.chunks:
                new[chunk.request][chunk.start : chunk.start + chunk.length] = chunk.rank
        for name, owners in zip(names, new, strict=True):
            request = self._of(name)
            request.owners = np.concatenate([request.owners, owners])
