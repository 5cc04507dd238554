"""One rank's view of a plan, as tensors: what to compute here, and how rows travel to and from the original order."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from cpattn.current import is_capturing
from cpattn.device_tables import DeviceTables, IntArray, SentTogether, Unsent, exclusive_cumsum, unsent, unsent_runs
from cpattn.errors import CPError, PlanError
from cpattn.graphs import leaves_graph
from cpattn.handles import new_handle, resolve
from cpattn.memo import Memo
from cpattn.metadata.bucket import Bucket
from cpattn.metadata.chunk_tables import chunk_tables
from cpattn.metadata.draft import Draft
from cpattn.metadata.gathered_runs import GatheredRuns
from cpattn.metadata.layout import Layout
from cpattn.metadata.notebook import rank_html
from cpattn.ops import implements

T = TypeVar("T")

# Kinds of calls over one batch: a model has few.
_MOST_REMEMBERED = 64


class CPMetadata:
    """One rank's part of a :class:`cpattn.Plan`. Built once a batch and used by every layer.

    Made by :meth:`Plan.metadata` or :func:`cpattn.build_metadata`. Local rows are ordered request by request, each
    request's chunks in sequence order (``[r0.front, r0.back, r1.front, ...]`` for zigzag), then padding.
    Integer tensors are int32 on ``device`` unless said otherwise. With a bucket they have the bucket's sizes: chunks
    that are not there are empty and at the end, tokens that are not there are -1. A notebook shows it as a table and a picture.

    Attributes:
        plan, cp_rank, device, bucket: what it was made from.
        num_tokens: logical rows of this rank: its tokens.
        rows: physical rows, padding included; the same on every rank.
        max_seqlen_q: the longest chunk here, in tokens (0 if there is none).
        max_seqlen_k: the longest ``k_len`` here (0 if there is no chunk).
        chunk_request ``[c]``: the request of each chunk that has a token here.
        cu_seqlens_q ``[c + 1]``: the row where each chunk begins; the last entry is ``num_tokens``.
        k_len ``[c]``: the keys that the chunk's last query sees: prefix_len + the chunk's end.
        k_start ``[c]``: where the request's keys begin when all requests' prefixes and extends lie one after another,
            ``[prefix 0, extend 0, prefix 1, extend 1, ...]``.
        token_count ``[1]``: num_tokens, on the device.
        handle: by which operators in compiled graphs refer to this metadata: int64 without an axis, on the CPU.
    """

    # A Plan, which is more than the Layout that is all that is used of it here: as Any its users may ask it for the rest.
    plan: Any

    @leaves_graph
    def __init__(self, plan: Layout, cp_rank: int, device: torch.device, bucket: Bucket | None = None) -> None:
        self.cp_rank = cp_rank
        self.bucket = bucket
        # Tables on the device that are made when first asked for, each with what makes it.
        self._derived: dict[Hashable, tuple[Callable[[], Any] | None, Any]] = {}
        # Those that went there together, where copy_ will put others in their place.
        self._sent: list[tuple[SentTogether, list[Draft[Any]]]] = []
        # What others want to ask of a plan before it is copied into this bucket; a dict, for their order.
        self._checks: dict[Callable[[Any], None], None] = {}
        self._work_out(plan)
        self.handle = new_handle(self)
        # Of no bytes: a graph reads the rows here and of the whole batch off its shape, and so takes any number of them.
        with torch.inference_mode(False):
            self._sizes = torch.empty(self.rows, self.whole_rows, 0, device="cpu")
        self._tables = DeviceTables(self._host, device)
        self.chunk_request = self._tables["chunk_request"]
        self.cu_seqlens_q = self._tables["cu_seqlens_q"]
        self.k_len = self._tables["k_len"]
        self.k_start = self._tables["k_start"]
        self.token_count = self._tables["token_count"]
        # "cuda" has become the device with its number, which is what tensors are compared with.
        self.device = self.cu_seqlens_q.device

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled as what it was made from, without what calls have derived: that refers to code and to the device."""
        return CPMetadata, (self.plan, self.cp_rank, self.device, self.bucket)

    def _work_out(self, plan: Layout) -> None:
        """All that follows from the plan, on the host."""
        self.plan = plan
        self.rows = plan.rows if self.bucket is None else self.bucket.max_rows
        # What a call worked out for this batch, on the host.
        self.memo: Memo[Hashable, Any] = Memo(_MOST_REMEMBERED)
        _, request, _, q_len, k_len = self.chunk_host = chunk_tables(plan, self.cp_rank)
        cu_seqlens_q = np.zeros(len(q_len) + 1, dtype=np.int64)
        q_len.cumsum(out=cu_seqlens_q[1:])

        self.num_tokens = int(cu_seqlens_q[-1])
        self.max_seqlen_q = int(q_len.max(initial=0))
        self.max_seqlen_k = int(k_len.max(initial=0))
        # What a window is compared with: the longest request, prefix included, that this metadata may come to hold.
        self.longest_request = int(plan.total_lens.max(initial=0)) if self.bucket is None else self.bucket.max_seqlen
        tables = {"chunk_request": request, "k_len": k_len, "k_start": self.k_starts[request], "cu_seqlens_q": cu_seqlens_q}
        if self.bucket is not None:
            tables = {name: np.pad(table, (0, self.bucket.max_chunks - len(request))) for name, table in tables.items()}
            tables["cu_seqlens_q"][len(cu_seqlens_q) :] = self.num_tokens
        self._host = {**tables, "token_count": np.array([self.num_tokens])}

    @leaves_graph
    def copy_(self, other: Layout | CPMetadata) -> None:
        """Puts another batch into this bucket: the same addresses, what the last batch left is cleared.

        Ordered with the current stream and without waiting for it, so that a graph captured with this metadata, replayed
        after it, computes the other batch.

        Args:
            other: the plan of the batch, or any rank's metadata of it.

        Raises:
            PlanError: this metadata has no bucket, the plan does not fit it, or it is laid out for other ranks; the same
                on every rank. Or a graph that was captured with this metadata cannot compute it.
            GroupError: a graph has captured a call over a group that was given up since, or in which a rank did not come.
        """
        plan: Any = other.plan if isinstance(other, CPMetadata) else other
        self._check_next(plan)
        self._work_out(plan)
        self._tables.copy_(self._host)
        for sent, drafts in self._sent:
            parts = [draft.make() for draft in drafts]
            there = sent if sent.copy_(parts) else SentTogether(parts, self.device)
            for draft, new in zip(drafts, there.made(parts), strict=True):
                _refill(self._derived[draft.key][1], new)
        for build, derived in self._derived.values():
            if build is not None:
                _refill(derived, build())

    def why_not(self, other: Layout | CPMetadata) -> str | None:
        """Why :meth:`copy_` could not put another batch into this bucket, or None where it could; the same on every rank.

        >>> import cpattn
        >>> bucket = cpattn.Bucket(max_requests=8, max_rows=16, max_chunks=16)
        >>> meta = cpattn.build_metadata([(0, 20)], cp_size=2, cp_rank=0, bucket=bucket)
        >>> meta.why_not(cpattn.plan([(0, 9), (4, 6)], cp_size=2, partition="whole")) is None
        True
        >>> meta.why_not(cpattn.plan([(0, 40)], cp_size=2)).partition(";")[0]
        'the plan does not fit the bucket: max_rows is 16, the plan needs 20'
        """
        try:
            self._check_next(other.plan if isinstance(other, CPMetadata) else other)
        except PlanError as error:
            return str(error)
        return None

    def _check_next(self, plan: Any) -> None:
        """Raises PlanError for what cannot be put into this bucket."""
        if not isinstance(plan, Layout):
            raise PlanError(f"copy_ got a {type(plan).__name__}; pass the Plan of the next batch, or any rank's CPMetadata of it")
        if self.bucket is None:
            raise PlanError("this metadata has no bucket, so its sizes are those of its batch; build it with bucket=cpattn.Bucket(...)")
        for name in ("cp_size", "kind", "sharded", "owner", "queries"):
            mine, theirs = getattr(self.plan, name), getattr(plan, name)
            if mine != theirs and not (name == "kind" and plan.may_follow(self.plan)):
                shown = "partition" if name == "kind" else name
                raise PlanError(f"the plan has {shown}={theirs!r}, this metadata {mine!r}; a graph cannot be replayed over another layout")
        self.bucket.check(plan)
        for check in self._checks:
            check(plan)

    def on_copy(self, check: Callable[[Any], None]) -> None:
        """Has :meth:`copy_` call ``check`` with each plan from now on, before anything changes; it raises PlanError for a plan that
        may not follow. What may not is known to whoever registers: a call that a graph has captured. Equal checks count once."""
        self._checks.setdefault(check)

    @leaves_graph
    def __repr__(self) -> str:
        return (
            f"CPMetadata(rank {self.cp_rank} of {self.plan.cp_size}: {self.num_tokens} tokens in {self.rows} rows, "
            f"{len(self.chunk_host.request)} chunks, on {self.device})"
        )

    @leaves_graph
    def _repr_html_(self) -> str:
        """What a notebook shows: this rank's numbers, and its chunks in the plan."""
        pairs, every = self.plan.rank_pairs[self.cp_rank], sum(self.plan.rank_pairs)
        share = f" ({pairs / every:.2%})" if every else ""
        own = f"{self.num_tokens:,} tokens in {self.rows:,} rows, {len(self.chunk_host.request):,} chunks, {pairs:,} query-key pairs{share}"
        lines = [(f"rank {self.cp_rank} of {self.plan.cp_size}", f"{own}, on {self.device}")]
        if self.bucket is not None:
            lines.append(("bucket", repr(self.bucket)))
        return rank_html(self.plan, self.cp_rank, lines)

    @property
    def token_index(self) -> Tensor:
        """``[rows]`` the row of each local token in the original ``[plan.num_tokens]`` order; -1 on padding."""
        return self._table("token_index")

    @property
    def position_ids(self) -> Tensor:
        """int64 ``[rows]``: the absolute position ``prefix_len + i`` of each local token, for RoPE; 0 on padding."""
        return self._table("position_ids")

    @property
    def restore_index(self) -> Tensor:
        """``[plan.num_tokens]`` where each original token lies in the rank-major gathered buffer ``[cp_size * rows]``; where each
        rank has all rows, in those."""
        return self._table("restore_index")

    def sizes_in_graph(self) -> tuple[int, int]:
        """``rows`` and ``whole_rows`` as a compiled graph can have them: as symbols, not as the numbers of one batch."""
        rows, whole_rows, _ = self._sizes.shape
        return rows, whole_rows

    @property
    def whole_rows(self) -> int:
        """Rows of what :func:`cpattn.unshard` returns: ``plan.num_tokens``, with a bucket ``cp_size * rows``, or ``rows`` where each
        rank has all of them."""
        plan: Layout = self.plan
        if self.bucket is None:
            return plan.num_tokens
        return self.rows if plan.all_queries else plan.cp_size * self.rows

    def _table(self, name: str) -> Tensor:
        if torch.compiler.is_dynamo_compiling():
            # A graph cannot end at an attribute to have the table made.
            rows, whole_rows = self.sizes_in_graph()
            size = whole_rows if name == "restore_index" else rows
            made: Tensor = torch.ops.cpattn.table.default(self.handle, name, size, self.device)
            return made
        if name in _OF_INPUT:
            self.derive_together(*map(self._table_draft, _OF_INPUT))
        return self.derive_sent(self._table_draft(name))

    def _table_draft(self, name: str) -> Draft[Tensor]:
        return Draft(name, partial(_TABLES[name], self))

    @property
    def restore_index_draft(self) -> Draft[Tensor]:
        """Of :attr:`restore_index`, to be sent with other tables."""
        return self._table_draft("restore_index")

    @property
    def extend_key_rows(self) -> Tensor:
        """``[plan.num_tokens]`` the row of each original token's key in the order that ``k_start`` speaks of."""
        return self.derive_sent(Draft("extend_key_rows", lambda: self._runs("extend_key", "extend_len", self.whole_rows)))

    def _require_no_bucket(self) -> None:
        if self.bucket is not None:
            raise PlanError("tables of all cached tokens change in size from batch to batch, and those of a bucket cannot")

    @property
    def prefix_key_rows(self) -> Tensor:
        """``[plan.num_prefix_tokens]`` the row of each prefix token's key in the order that ``k_start`` speaks of."""
        self._require_no_bucket()
        total = self.plan.num_prefix_tokens
        return self.derive_sent(Draft("prefix_key_rows", lambda: self._runs("prefix_key", "prefix_len", total)))

    @property
    def gathered_places(self) -> tuple[Tensor, Tensor]:
        """The request and the absolute position of each row of the gathered buffer, ``[cp_size * rows]`` each; -1 on padding."""
        request, position = self.derive_sent(self.gathered_places_draft)
        return request, position

    @property
    def gathered_runs(self) -> GatheredRuns:
        """What it is made of, worked out once for a batch."""
        found: GatheredRuns | None = self.memo.get("gathered runs")
        return found or self.memo.keep("gathered runs", GatheredRuns.of(self.plan, self.rows))

    @property
    def gathered_places_by_rank(self) -> list[tuple[Tensor, Tensor]]:
        """The same for each rank's rows, ``[rows]`` each."""
        by_rank: list[tuple[Tensor, Tensor]] | None = self.memo.get("gathered places by rank")
        if by_rank is None:
            request, position = self.gathered_places
            by_rank = list(zip(torch.split(request, self.rows), torch.split(position, self.rows), strict=True))
            self.memo.keep("gathered places by rank", by_rank)
        return by_rank

    @property
    def held_places(self) -> tuple[Tensor, Tensor]:
        """The request of each local row, and its number among the request's tokens that this rank holds, ``[rows]`` each;
        -1 on padding. What is cached comes first, then the new tokens in local order."""

        return self._numbered("held_places", "chunk_request", "held_start", "q_len", self.rows)

    @property
    def key_places(self) -> tuple[Tensor, Tensor]:
        """The request and the absolute position of all keys, prefixes and extends, in the order that ``k_start`` speaks of."""
        self._require_no_bucket()
        total = self.plan.num_prefix_tokens + self.plan.num_tokens
        return self._numbered("key_places", "request", "zero", "total_len", total)

    @property
    def prefix_places(self) -> tuple[Tensor, Tensor]:
        """The request and the absolute position of all prefix tokens, request after request."""
        self._require_no_bucket()
        total = self.plan.num_prefix_tokens
        return self._numbered("prefix_places", "request", "zero", "prefix_len", total)

    @property
    def shard_places(self) -> tuple[Tensor, Tensor]:
        """Of each token that this rank holds, cached and new, request after request: its request, and its number among the
        tokens of that. Then -1, up to the number of the rank that holds the most."""
        self._require_no_bucket()
        return self._numbered("shard_places", "request", "zero", "shard_len", self.plan.largest_shard)

    @property
    def k_starts(self) -> IntArray:
        """``[num_requests]`` on the host: what ``k_start`` holds, for every request."""
        return exclusive_cumsum(self.plan.total_lens)

    def derive(self, key: Hashable, build: Callable[[], T]) -> T:
        """``build()`` at the first call with this key, the same object ever after: tables that a layer above needs
        once a batch. A tensor, something with ``copy_``, or a tuple or list of them: :meth:`copy_` refills it."""
        if key not in self._derived:
            self._make(key, build)
        value: T = self._derived[key][1]
        return value

    def derive_together(self, *drafts: Draft[Any]) -> None:
        """Makes what is not there yet of some tables, in one copy to the device. :meth:`derive_sent` then finds them."""
        missing = [draft for draft in drafts if draft.key not in self._derived]
        if missing:
            self._send(missing)

    def derive_sent(self, draft: Draft[T]) -> T:
        """What becomes of a draft, the same object ever after, as of :meth:`derive`."""
        self.derive_together(draft)
        value: T = self._derived[draft.key][1]
        return value

    @leaves_graph
    def _make(self, key: Hashable, build: Callable[[], Any]) -> None:
        self._refuse_capture(key)
        # Tensors made under inference_mode could not be refilled outside of it.
        with torch.inference_mode(False):
            # What makes them refers to this, and so do they then: kept only where copy_ will ask for it.
            self._derived[key] = build if self.bucket is not None else None, build()

    @leaves_graph
    def _send(self, drafts: list[Draft[Any]]) -> None:
        self._refuse_capture(drafts[0].key)
        with torch.inference_mode(False):
            parts = [draft.make() for draft in drafts]
            sent = SentTogether(parts, self.device)
            made = sent.made(parts)
        if self.bucket is not None:
            self._sent.append((sent, drafts))
        for draft, value in zip(drafts, made, strict=True):
            self._derived[draft.key] = None, value

    def _refuse_capture(self, key: Hashable) -> None:
        if is_capturing(self.token_count.device):
            raise CPError(
                f"the tables {key!r} of this metadata would be made while a CUDA graph is captured, and again by every replay; "
                "make the same call once with the same metadata before capturing it"
            )

    def _runs(self, first: str, lengths: str, capacity: int, fill: int = -1) -> Unsent[Tensor]:
        """Token-level numbers from two of the small :data:`_COLUMNS`, filled up to ``capacity``."""
        runs = unsent_runs({"": (_COLUMNS[first](self), _COLUMNS[lengths](self))}, self.device, size=capacity, fill=fill)
        return Unsent(runs.tables, lambda sent: runs.finish(sent)[""])

    def _numbered(self, key: str, first: str, numbers: str, lengths: str, capacity: int) -> tuple[Tensor, Tensor]:
        """Of each token one number of its run, as it is, and another that grows within the run; filled up to ``capacity``."""

        def make() -> Unsent[tuple[Tensor, ...]]:
            columns = {name: (_COLUMNS[name](self), _COLUMNS[lengths](self)) for name in (first, numbers)}
            runs = unsent_runs(columns, self.device, repeated=(first,), size=capacity)
            return Unsent(runs.tables, lambda sent: tuple(runs.finish(sent).values()))

        repeated, growing = self.derive_sent(Draft(key, make))
        return repeated, growing

    @property
    def held_starts(self) -> IntArray:
        """Where each chunk's tokens go among those that this rank holds of the request: after the cached ones. (Not where each rank has
        queries of all tokens: kept_places are of those.)"""
        plan, chunks = self.plan, self.chunk_host
        before = plan.shard_lens[:, self.cp_rank] - exclusive_cumsum(plan.rank_extends[:, self.cp_rank])
        held: IntArray = exclusive_cumsum(chunks.q_len) + before[chunks.request]
        return held

    @property
    def _shard_lens(self) -> IntArray:
        """Of each request the tokens that this rank holds, new ones included."""
        lens: IntArray = self.plan.shard_lens[:, self.cp_rank] + self.plan.rank_extends[:, self.cp_rank]
        return lens

    @property
    def gathered_places_draft(self) -> Draft[tuple[Tensor, ...]]:
        """Of :attr:`gathered_places`, to be sent with others."""
        return Draft("gathered_places", lambda: unsent([self.gathered_runs.request(), self.gathered_runs.position()]))


# What token-level tables are expanded from: of each chunk here, of each of the batch in the gathered buffer, or of each request.
_COLUMNS: dict[str, Callable[[CPMetadata], IntArray]] = {
    "chunk_request": lambda meta: meta.chunk_host.request,
    "q_len": lambda meta: meta.chunk_host.q_len,
    "token_start": lambda meta: exclusive_cumsum(meta.plan.extend_lens)[meta.chunk_host.request] + meta.chunk_host.start,
    "position_start": lambda meta: meta.chunk_host.k_len - meta.chunk_host.q_len,
    "held_start": lambda meta: meta.held_starts,
    "gathered_start": lambda meta: (
        np.zeros(1, dtype=np.int64) if meta.plan.all_queries else meta.plan.chunk_table.rank * meta.rows + meta.plan.chunk_rows
    ),
    "chunk_length": lambda meta: np.array([meta.plan.num_tokens]) if meta.plan.all_queries else meta.plan.chunk_table.length,
    "request": lambda meta: np.arange(len(meta.plan.batch)),
    "zero": lambda meta: np.zeros(len(meta.plan.batch), dtype=np.int64),
    "extend_key": lambda meta: meta.k_starts + meta.plan.prefix_lens,
    "extend_len": lambda meta: meta.plan.extend_lens,
    "prefix_key": lambda meta: meta.k_starts,
    "prefix_len": lambda meta: meta.plan.prefix_lens,
    "total_len": lambda meta: meta.plan.total_lens,
    "shard_len": lambda meta: meta._shard_lens,
}

# What models read of the metadata, also in compiled graphs.
_TABLES: dict[str, Callable[[CPMetadata], Unsent[Tensor]]] = {
    "token_index": lambda meta: meta._runs("token_start", "q_len", meta.rows),
    "position_ids": lambda meta: _as_int64(meta._runs("position_start", "q_len", meta.rows, fill=0)),
    "restore_index": lambda meta: meta._runs("gathered_start", "chunk_length", meta.whole_rows),
}


# Of the rows that go into a model: whoever asks for one of them mostly wants both.
_OF_INPUT = ("token_index", "position_ids")


def _as_int64(runs: Unsent[Tensor]) -> Unsent[Tensor]:
    return Unsent(runs.tables, lambda sent: runs.finish(sent).to(torch.int64))


@implements("table")
def _copied_table(meta: Tensor, name: str, size: int, device: torch.device) -> Tensor:
    """A copy: the memory of what an operator returns belongs to the graph, which may write to it."""
    table: Tensor = getattr(resolve(meta, CPMetadata), name)
    return table.clone()


def _refill(old: Any, new: Any) -> None:
    if isinstance(old, (tuple, list)):
        for one, other in zip(old, new, strict=True):
            _refill(one, other)
    elif not isinstance(old, Tensor) or old.data_ptr() != new.data_ptr():
        old.copy_(new)
