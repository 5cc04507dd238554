"""KVPool: pages for those without an engine of their own: which request has which pages, and which are free."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Hashable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cpattn.costs.known_machine import machine_for
from cpattn.device_tables import IntArray
from cpattn.errors import CPError
from cpattn.graphs import leaves_graph
from cpattn.kv_cache import PagedKV, TableLines
from cpattn.machine import Machine
from cpattn.memo import Memo
from cpattn.metadata.auto_partition import AUTO
from cpattn.metadata.devices import parse_device
from cpattn.metadata.partition import Partition
from cpattn.metadata.plan import Plan, plan
from cpattn.metadata.prefix_ranks import PrefixRanks
from cpattn.metadata.striped import Striped
from cpattn.pool import checks
from cpattn.pool.books import CachedRequest, PageBooks, no_pages
from cpattn.pool.history import Before, History, pages_written
from cpattn.problem import Problem

_TABLES_REMEMBERED = 64


class _MadeTable(NamedTuple):
    """A page table, how often it had been written to when it was made, and what is known of it as long as that is so."""

    table: weakref.ref[Tensor]
    version: int
    lines: TableLines


@leaves_graph
class KVPool:
    """One rank's pages for all layers, and the bookkeeping of all ranks' pages, which every rank does alike.

    A step of an engine: :meth:`plan` lays out which requests get how many new tokens, and takes the pages for them;
    each layer calls ``cp_attention(..., kv_cache=pool.layer(n, page_table))``, which writes them. A step that the pool is
    too full for raises, on every rank, and changes nothing. A step that fails later is taken back by :meth:`undo`.

    >>> import cpattn
    >>> pool = cpattn.KVPool(num_pages=8, page_size=4, num_layers=1, kv_heads=2, head_dim=16)
    >>> pool.admit("a")
    >>> pool.plan([("a", 6)]).batch  # a prefill of 6 tokens
    (Request(prefix_len=0, extend_len=6),)
    >>> pool.length("a"), pool.free_pages
    (6, 6)
    >>> pool.fork("a", "b", 5)  # another request begins with the same 5 tokens, in the same pages
    >>> step = pool.plan([("a", 1), ("b", 3)])  # one decodes, one prefills its rest, in a page of its own
    >>> step.batch
    (Request(prefix_len=6, extend_len=1), Request(prefix_len=5, extend_len=3))
    >>> pool.undo(step)  # the step failed: its tokens are not in the cache
    >>> pool.length("a"), pool.length("b")
    (6, 5)
    >>> pool.truncate("a", 4)  # the last two were drafts, and rejected
    >>> pool.release("a")
    >>> pool.release("b")
    >>> pool
    KVPool(8 pages of 4 tokens, 8 free, 0 requests, 1 layers of 2 heads, k 16, v 16, torch.float32, cpu, rank 0 of 1, replicated)

    In fp8 pages take half the memory, and tokens half the bytes on their way. Scales go where their tokens go:

    >>> pool = cpattn.KVPool(8, 4, 1, 2, 16, dtype=torch.float8_e4m3fn, scales="head")
    >>> pool.k_scale.copy_(torch.tensor([[0.02, 0.03]]))  # of the one layer's two heads, before anything is written
    tensor([[0.0200, 0.0300]])

    Every argument is checked: what is wrong raises CPError, and nothing has changed.

    Args:
        num_pages: of this rank; the same on every rank.
        page_size: tokens of a page.
        num_layers, kv_heads, head_dim: of the model.
        v_head_dim: that of K if None; 0 where V is a part of K (MLA).
        dtype, device: of the pages; a dtype of half precision or fp8 whatever that of the queries is.
        scales: of fp8 pages: ``"token"``, each token and head gets one as it is written; or ``"head"``, one a layer and KV head. Those are
            ``k_scale`` and ``v_scale``, fp32 ``[num_layers, kv_heads]``, at first 1: set them, alike on every rank, before tokens are
            written. Pages hold numbers divided by them.
        cp_size, cp_rank: of the group.
        owner: which rank holds a token: ``"replicated"``, every rank all of them; ``"computed"``, the rank that computed it;
            or :class:`Striped`, a rank by the token's position.
        sharded: True for ``owner="computed"``, False for ``"replicated"``; instead of owner.
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
        owner: str | Striped | None = None,
        sharded: bool | None = None,
        scales: str | None = None,
    ) -> None:
        sizes = {"num_layers": num_layers, "num_pages": num_pages, "page_size": page_size, "kv_heads": kv_heads}
        shape = [checks.parse_size(name, size) for name, size in sizes.items()]
        head_dim = checks.parse_size("head_dim", head_dim)
        v_head_dim = head_dim if v_head_dim is None else checks.parse_size("v_head_dim", v_head_dim, least=0)
        owner = checks.parse_owner(owner, sharded)
        checks.check_dtype(dtype)
        self.scales = checks.parse_scales(scales, dtype)
        device = parse_device(device)
        checks.check_holds_data(device)
        self.page_size = shape[2]
        self.cp_size = checks.parse_size("cp_size", cp_size)
        self.cp_rank = checks.parse_rank(cp_rank, self.cp_size)
        self.owner = owner
        self.sharded = owner != "replicated"
        # Pages made under inference_mode could not be written outside of it.
        with torch.inference_mode(False):
            # Zeros, as kernels that load whole pages multiply what lies after a sequence by a weight of 0.
            self.k_pages = checks.make_pages((*shape, head_dim), dtype, device)
            self.v_pages = checks.make_pages((*shape, v_head_dim), dtype, device) if v_head_dim else None
            self.k_scale = self._make_scales(device)
            self.v_scale = self._make_scales(device) if v_head_dim else None
        self._rule = owner if isinstance(owner, Striped) else None
        self._holders = self.cp_size if self.sharded else 1
        self._here = self.cp_rank if self.sharded else 0
        self._books = PageBooks(self._holders, shape[1])
        self._requests: dict[Hashable, CachedRequest] = {}
        self._history = History()
        # What is known of the page tables that were made last, by their id().
        self._tables: Memo[int, _MadeTable] = Memo(_TABLES_REMEMBERED)

    def __repr__(self) -> str:
        layers, pages, _, heads, head_dim = self.k_pages.shape
        v_head_dim = 0 if self.v_pages is None else self.v_pages.shape[-1]
        return (
            f"KVPool({pages} pages of {self.page_size} tokens, {self.free_pages} free, {len(self._requests)} requests, "
            f"{layers} layers of {heads} heads, k {head_dim}, v {v_head_dim}, {self.k_pages.dtype}{self._scales_in_words}, "
            f"{self.k_pages.device}, "
            f"rank {self.cp_rank} of {self.cp_size}, {self._owner_in_words})"
        )

    def _make_scales(self, device: torch.device) -> Tensor | None:
        """``[num_layers, kv_heads]``, or in pages ``[num_layers, num_pages, page_size, kv_heads]``."""
        shape = self.k_pages.shape[:4]
        if self.scales == "head":
            return torch.ones(shape[0], shape[3], device=device)
        return checks.make_pages((*shape, 1), torch.float32, device)[..., 0] if self.scales == "token" else None

    @property
    def _scales_in_words(self) -> str:
        return "" if self.scales is None else f" with a scale for each {'token and head' if self.scales == 'token' else 'head'}"

    @property
    def _owner_in_words(self) -> str:
        return repr(self._rule) if self._rule is not None else "sharded" if self.sharded else "replicated"

    @property
    def free_pages(self) -> int:
        """Pages that are free on the rank that has the fewest."""
        return min(map(len, self._books.free))

    def length(self, request: Hashable) -> int:
        """Tokens of the request that are in the cache, over all ranks."""
        return self._of(request).length

    def admit(self, request: Hashable) -> None:
        """A new request without tokens. Raises CPError if there is one of that name."""
        self._check_unused(request)
        self._requests[request] = CachedRequest(np.zeros(self._holders, dtype=np.int64), [no_pages() for _ in range(self._holders)])

    def fork(self, parent: Hashable, child: Hashable, length: int) -> None:
        """A new request whose first ``length`` tokens are the parent's. It shares the parent's pages, and takes none: the step
        that first writes to a shared page copies it then.

        So tokens that :meth:`plan` has counted may be forked before the layers write them. Raises CPError if the parent has
        fewer tokens.
        """
        source = self._of(parent)
        self._check_unused(child)
        length = checks.parse_length(length, parent, source.length)
        held = self._held(source, length)
        pages = [pages[:count] for pages, count in zip(source.pages, self._pages_for(held), strict=True)]
        for holder, shared in enumerate(pages):
            self._books.share(holder, shared)
        inherited = self._history.tokens_of_steps(source, length)
        self._requests[child] = CachedRequest(held, pages, length, source.owners[:length], inherited)

    def truncate(self, request: Hashable, length: int) -> None:
        """Drops a request's tokens from ``length`` on, such as drafts that were rejected; the next ones take their places.

        Pages that are not needed any more are free again, except those that others share. Raises CPError for more tokens than
        there are.
        """
        cached = self._of(request)
        self._cut(cached, checks.parse_length(length, request, cached.length))

    def plan(
        self,
        extends: Sequence[tuple[Hashable, int]],
        *,
        partition: str | Partition | None = None,
        pad_to: int = 1,
        queries: str = "rows",
        problem: Problem | None = None,
        machine: Machine | str | None = None,
        token_cost: int | None = None,
    ) -> Plan:
        """The plan of a step in which each request gets so many new tokens, and the pages to write them to. The partition is
        ``"auto"`` unless another is asked for; without a ``problem`` it goes by the pool's own heads, four query heads for each, and
        without a ``machine`` by that of the pages (:func:`cpattn.machine_for`), which is the same on every rank where ranks have GPUs of
        one kind. With ``owner="computed"`` it is ``"zigzag"``, as the partition then says where tokens stay: a rank that computes a
        whole request would hold it, and decode it alone. The rest is as in :func:`cpattn.plan`.

        Where new tokens go to a part-filled page that other requests share, the request gets a page of its own with a copy of
        the tokens in it. So compute a step, or put it into the device's queue, before the next is planned.

        Raises PoolFullError if some rank has too few free pages, CPError for a request that is unknown or named twice;
        nothing has changed.
        """
        pairs = checks.parse_extends(extends)
        names = [name for name, _ in pairs]
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise CPError(f"request {twice[0]!r} is in the step twice; give all of its new tokens at once")
        requests = [self._of(name) for name in names]
        batch = [(request.length, extend) for request, (_, extend) in zip(requests, pairs, strict=True)]
        if partition is None:
            partition = "zigzag" if self.owner == "computed" and problem is None and machine is None and token_cost is None else AUTO
        if isinstance(partition, str) and partition == AUTO and problem is None:
            problem, machine = self._usual_problem, machine or self._usual_machine
        held = self._held_by(requests)
        ranks = PrefixRanks([request.owners for request in requests], held) if self.owner == "computed" else None
        planned = plan(
            batch,
            self.cp_size,
            partition=partition,
            pad_to=pad_to,
            prefix_ranks=ranks,
            owner=self._rule,
            queries=queries,
            problem=problem,
            machine=machine,
            token_cost=token_cost,
        )
        new = planned.held_lens - held if self.sharded else planned.extend_lens[:, None]
        self._take_pages(requests, held, new, f"the {planned.num_tokens} new tokens of {len(names)} requests")
        before = [Before(name, request, request.length) for name, request in zip(names, requests, strict=True)]
        self._append(requests, planned, held + new)
        self._history.add(planned, before, pages_written(requests, held, new, self.page_size, self._books.takes))
        return planned

    @cached_property
    def _usual_problem(self) -> Problem:
        """What calls over these pages ask for, with four query heads for each of theirs."""
        _, _, page_size, heads, head_dim = self.k_pages.shape
        v_head_dim = head_dim if self.v_pages is None else self.v_pages.shape[-1]
        of_heads: dict[str, Any] = {"q_heads": 4 * heads, "kv_heads": heads, "head_dim": head_dim, "v_head_dim": v_head_dim}
        kind: dict[str, Any] = {"v_in_k": self.v_pages is None, "cache": "paged", "page_size": page_size, "scales": self.scales}
        dtype = self.k_pages.dtype
        if self.scales is not None:
            kind["kv_dtype"], dtype = dtype, torch.bfloat16
        return Problem(self.k_pages.device, dtype, 0, **of_heads, **kind)

    @cached_property
    def _usual_machine(self) -> Machine:
        """Where these pages lie, with the backends that can serve such calls."""
        return machine_for(self._usual_problem)

    def undo(self, plan: Plan) -> None:
        """Takes the last step back: its requests have the tokens and pages that they had before it. Call it on every rank after a
        step that failed on any, then plan again.

        Steps are undone last step first, each once, by the very object that :meth:`plan` returned. What the step may have
        written on this rank becomes zeros, as a NaN would reach other requests: kernels that load whole pages multiply what
        lies after a sequence by 0. That holds for requests that were released or truncated since as well: they stay as they
        are, without tokens of the step. A page that the step copied stays the request's own: it holds the same prefix, and
        the page that it was copied from may have changed hands.

        Raises CPError for any other plan, or if a request that was forked since has tokens of the step; nothing has changed.
        """
        step = self._history.last(plan)
        step.check_no_heir(self._requests)
        # Pages that a later step has taken, itself undone since, are clean, and may hold what that step copied there.
        written = [one for one in step.written if self._books.takes[one.holder][one.page] == one.takes]
        # The last request first, and of each the last page: the step planned again takes the same pages.
        for name, request, length in reversed(step.before):
            # A request that was released may have been admitted again under its name.
            if self._requests.get(name) is request:
                self._cut(request, min(length, request.length))
        here = [one for one in written if one.holder == self._here]
        self._clear([one.page for one in here if not one.start])
        for one in here:
            if one.start:
                self._clear([one.page], one.start)
        self._history.drop_last()

    def release(self, request: Hashable) -> None:
        """Forgets a request; pages that no other one shares are free again."""
        forgotten = self._of(request)
        del self._requests[request]
        for holder, pages in enumerate(forgotten.pages):
            self._books.give_back(holder, pages)

    def page_table(self, requests: Sequence[Hashable], shape: tuple[int, int] | None = None) -> Tensor:
        """int32 ``[len(requests), max_pages]`` on the pages' device: this rank's pages of each; as wide on every rank.

        Args:
            requests: in the order of the plan.
            shape: of the table, where it has to be that of a bucket; lines and pages that are not there are 0. Raises
                CPError if it is too small.
        """
        cached = [self._of(name) for name in checks.parse_names(requests)]
        width = max((len(pages) for request in cached for pages in request.pages), default=0)
        size = (len(cached), max(width, 1)) if shape is None else checks.parse_shape(shape, len(cached), width)
        table = np.zeros(size, dtype=np.int32)
        for line, request in zip(table, cached, strict=False):
            pages = request.pages[self._here]
            line[: len(pages)] = pages
        # A tensor of inference mode does not count its changes, which layer looks at.
        with torch.inference_mode(False):
            made = torch.from_numpy(table).to(self.k_pages.device)
        tokens = np.zeros((size[0], self._holders), dtype=np.int64)
        tokens[: len(cached)] = self._held_by(cached)
        self._tables.keep(id(made), _MadeTable(weakref.ref(made), made._version, TableLines(tokens, self.sharded, self._rule)))
        return made

    def layer(self, layer: int, page_table: Tensor) -> PagedKV:
        """One layer's pages, as ``kv_cache`` of a step; the page table is made once a step and serves all layers."""
        checks.check_layer(layer, len(self.k_pages), page_table)
        made = self._tables.get(id(page_table))
        # An id may be that of a tensor that is gone, and a table of a fixed address may have been written to since.
        is_as_made = made is not None and made.table() is page_table and made.version == page_table._version
        lines = made.lines if made is not None and is_as_made else None
        _, v_pages, k_scale, v_scale = (None if x is None else x[layer] for x in (self.k_pages, self.v_pages, self.k_scale, self.v_scale))
        return PagedKV(self.k_pages[layer], v_pages, page_table, lines, k_scale, v_scale)

    def _of(self, request: Hashable) -> CachedRequest:
        checks.check_name(request)
        if request not in self._requests:
            raise CPError(f"request {request!r} is not in the pool; admit it first")
        return self._requests[request]

    def _check_unused(self, request: Hashable) -> None:
        checks.check_name(request)
        if request in self._requests:
            raise CPError(f"request {request!r} is in the pool already; release it first, or choose another name")

    def _held(self, request: CachedRequest, length: int) -> IntArray:
        """``[holders]`` how many of the request's first ``length`` tokens each has."""
        if self._rule is not None:
            return self._rule.held(np.array([length]), self.cp_size).reshape(-1)
        if not self.sharded:
            return np.array([length])
        return request.held - np.bincount(request.owners[length:], minlength=self._holders)

    def _held_by(self, requests: Sequence[CachedRequest]) -> IntArray:
        """``[requests, holders]`` how many of their tokens each has."""
        return np.array([request.held for request in requests], dtype=np.int64).reshape(-1, self._holders)

    def _pages_for(self, tokens: IntArray) -> IntArray:
        return -(-tokens // self.page_size)

    def _take_pages(self, requests: Sequence[CachedRequest], held: IntArray, new: IntArray, what: str) -> None:
        """Gives requests the pages for new tokens, copies of shared pages included; ``held`` and ``new`` ``[requests, holders]``."""
        rest = held % self.page_size
        missing = self._pages_for(held + new) - self._pages_for(held)
        copies = []
        for holder in range(self._holders):
            lines = np.flatnonzero((new[:, holder] > 0) & (rest[:, holder] > 0)).tolist()
            copies.append(self._books.to_copy(holder, [(line, requests[line].pages[holder][-1]) for line in lines]))
        if any(copies):
            what += ", and copies of pages that they share,"
        self._books.require(missing.sum(axis=0) + list(map(len, copies)), self.page_size, what)
        for holder, copied in enumerate(copies):
            for line, shared in copied.items():
                own = self._books.take(holder)
                if holder == self._here:
                    self._copy(shared, own, int(rest[line, holder]))
                requests[line].pages[holder][-1] = own
                self._books.give_back(holder, [shared])
            for line in np.flatnonzero(missing[:, holder]).tolist():
                requests[line].pages[holder].extend(self._books.take(holder) for _ in range(missing[line, holder]))

    def _append(self, requests: Sequence[CachedRequest], planned: Plan, held: IntArray) -> None:
        """Counts a step's new tokens as the requests', of which ``held [requests, holders]`` lie with each holder then."""
        if self.owner == "computed":
            owners = planned.chunk_table.rank_of_tokens
            end = 0
            for request, (_, extend) in zip(requests, planned.batch, strict=True):
                begin, end = end, end + extend
                request.owners = np.concatenate([request.owners, owners[begin:end]])
        for request, (_, extend), now in zip(requests, planned.batch, held, strict=True):
            request.length, request.held = request.length + extend, now.copy()

    def _cut(self, request: CachedRequest, length: int) -> None:
        """Leaves a request its first tokens alone."""
        request.held, request.owners, request.length = self._held(request, length), request.owners[:length], length
        request.inherited = [inherited for inherited in request.inherited if inherited.first < length]
        for holder, kept in enumerate(self._pages_for(request.held)):
            pages, dropped = request.pages[holder][:kept], request.pages[holder][kept:]
            request.pages[holder] = pages
            self._books.give_back(holder, reversed(dropped))

    # What is done to this rank's pages, in all layers. Page numbers go to the device as arguments of launches: an index in a
    # tensor would have to be copied there, and waited for.

    def _paged(self) -> list[Tensor]:
        """All that lies in pages."""
        of_tokens = (self.k_scale, self.v_scale) if self.scales == "token" else ()
        return [x for x in (self.k_pages, self.v_pages, *of_tokens) if x is not None]

    def _copy(self, source: int, target: int, tokens: int) -> None:
        for x in self._paged():
            x[:, target, :tokens] = x[:, source, :tokens]

    def _clear(self, pages: Sequence[int], start: int = 0) -> None:
        """Zeros from token ``start`` of each page on: one launch for every run of neighbours, as those of a prefill mostly are."""
        numbers = np.sort(pages)
        for run in np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1) if pages else []:
            for x in self._paged():
                x[:, int(run[0]) : int(run[-1]) + 1, start:].zero_()
