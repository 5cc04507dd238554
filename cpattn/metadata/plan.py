"""The plan: the layout of a whole batch over all ranks, the same object on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cpattn.device_tables import IntArray
from cpattn.errors import PlanError, RankError, shown
from cpattn.graphs import leaves_graph
from cpattn.machine import Machine
from cpattn.metadata.auto_partition import AUTO, CANDIDATES, AutoChoice
from cpattn.metadata.batch import MAX_TOKENS, CheckedBatch, Request, is_integer, parse_batch
from cpattn.metadata.bucket import Bucket
from cpattn.metadata.cp_metadata import CPMetadata
from cpattn.metadata.devices import parse_device
from cpattn.metadata.draw import draw_plan, summarize_plan
from cpattn.metadata.layout import MOST_SHARES, QUERIES, Layout, frozen, is_size
from cpattn.metadata.layout import Chunk as Chunk
from cpattn.metadata.notebook import plan_html
from cpattn.metadata.partition import OWNERS, REMAINDERS, Partition, chunk_lengths, first_dealt
from cpattn.metadata.prefix_ranks import PrefixRanks
from cpattn.metadata.striped import Striped, parse_owner
from cpattn.problem import Problem


@dataclass(frozen=True, repr=False)
class Plan(Layout):
    """The layout of a batch over ``cp_size`` ranks. Frozen, hashable, and the same on every rank.

    Made by :func:`plan`, which explains the arguments. All else is worked out from them when first asked for. Of a partition
    of your own a plan keeps the chunks: plans are equal where those are, and can be pickled whatever the function was. A
    notebook shows a plan as a table and a picture.
    """

    def fits(self, bucket: Bucket | CPMetadata) -> bool:
        """Whether the metadata of every rank fit into a bucket; or whether this batch can be put into metadata that have one, and graphs
        that were captured with them can be replayed over it. The answer is the same on every rank; ``bucket.why_not(plan)`` says why not.

        >>> import cpattn
        >>> bucket = cpattn.Bucket(max_requests=4, max_rows=8, max_chunks=8)
        >>> cpattn.plan([(0, 10)], cp_size=2).fits(bucket)
        True
        >>> bucket.why_not(cpattn.plan([(0, 20)], cp_size=2))
        'max_rows is 8, the plan needs 10'
        """
        if not isinstance(bucket, CPMetadata):
            _check_bucket(bucket, "or metadata that have one")
        return bucket.why_not(self) is None

    @leaves_graph
    def metadata(self, cp_rank: int, device: torch.device | str = "cpu", bucket: Bucket | None = None) -> CPMetadata:
        """One rank's view of this plan, as tensors on ``device``, brought there in one copy.

        With a ``bucket`` the tensors have the bucket's sizes, whatever the batch, and :meth:`CPMetadata.copy_` can put
        another batch in their place. Raises RankError for a rank outside 0 .. cp_size - 1, PlanError for a plan that
        does not fit the bucket.
        """
        given: Any = cp_rank
        if not is_integer(given) or not 0 <= given < self.cp_size:
            raise RankError(
                f"cp_rank={shown(cp_rank)}; it must be an integer from 0 to {self.cp_size - 1} (the plan's cp_size is {self.cp_size})"
            )
        if bucket is not None:
            _check_bucket(bucket, "or None")
            bucket.check(self)
        return CPMetadata(self, int(cp_rank), parse_device(device), bucket)

    @leaves_graph
    def summary(self) -> str:
        """A table to read: for each rank its tokens, padding and query-key pairs; then the imbalance."""
        return summarize_plan(self)

    @leaves_graph
    def draw(self, width: int = 60) -> str:
        """A text picture: one line a request, one mark for each token (for several where it is long), naming its rank.

        Of more than 24 requests those that are alike share a line, and 24 lines are drawn, those with the most work. Where caches are
        sharded, a second line says for each token the rank whose cache holds it after the step; 12 requests are then drawn.

        >>> import cpattn
        >>> print(cpattn.plan([(4, 1)] * 40, cp_size=2).draw())
        . cached token   0 1 .. 9 a b ..: new token, by its rank   xN: N tokens a mark
        20 requests: 4 + 1 |....0|
        20 requests: 4 + 1 |....1|
        >>> print(cpattn.plan([(4, 6)], cp_size=2, owner=cpattn.Striped()).draw())
        . cached token   0 1 .. 9 a b ..: new token, by its rank   xN: N tokens a mark
        held by: the rank whose cache holds a token after the step   * several ranks
        request 0: 4 + 6 |....001110|
          held by        |0101010101|

        Args:
            width: how many marks a line has at most.
        """
        return draw_plan(self, width)

    @leaves_graph
    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return plan_html(self)

    # Of zigzag and contiguous alone, which cut all requests alike. ``chunk_table`` says the same of any partition.

    @cached_property
    def chunk_rank(self) -> IntArray:
        """``[num_chunks]`` the rank that owns each chunk; the same for every request. This and the next four are for zigzag and
        contiguous, and raise PlanError for any other partition: its chunks are in ``chunk_table``."""
        if not self.cuts_alike:
            raise PlanError(
                f"partition {self.partition!r} need not cut all requests alike; plan.chunk_table has the chunks of any partition"
            )
        return frozen(OWNERS[str(self.partition)](self.cp_size))

    @cached_property
    def lengths(self) -> IntArray:
        """``[num_requests, num_chunks]`` tokens of each chunk, empty ones included."""
        dealer = 0 if self.computed_lens is None else first_dealt(self.extend_lens, self.computed_lens)
        return frozen(chunk_lengths(self.extend_lens, self.chunk_rank, self.cp_size, self.remainder, dealer))

    @cached_property
    def starts(self) -> IntArray:
        """``[num_requests, num_chunks]`` where each chunk begins within its request's extend."""
        return frozen(self.lengths.cumsum(axis=1) - self.lengths)

    @cached_property
    def rank_columns(self) -> IntArray:
        """``[cp_size, chunks per rank]`` the columns of ``lengths`` that each rank owns, in sequence order."""
        return frozen(np.argsort(self.chunk_rank, kind="stable").reshape(self.cp_size, -1))

    @cached_property
    def local_starts(self) -> IntArray:
        """``[num_requests, num_chunks]`` the row at which each chunk begins on the rank that owns it."""
        lengths, columns = self.lengths, self.rank_columns
        local = np.empty_like(lengths)
        for mine in columns:
            flat = lengths[:, mine].ravel()
            local[:, mine] = (flat.cumsum() - flat).reshape(len(lengths), len(mine))
        return frozen(local)


@leaves_graph
def plan(
    batch: Sequence[tuple[int, int]] | Sequence[Request] | npt.NDArray[Any],
    cp_size: int,
    *,
    partition: str | Partition = "zigzag",
    remainder: str = "balanced",
    pad_to: int = 1,
    prefix_shards: Sequence[Sequence[int]] | npt.NDArray[Any] | None = None,
    prefix_ranks: Sequence[Sequence[int]] | Sequence[npt.NDArray[Any]] | PrefixRanks | None = None,
    owner: Striped | None = None,
    queries: str = "rows",
    problem: Problem | None = None,
    machine: Machine | str | None = None,
    token_cost: int | None = None,
) -> Plan:
    """Lays a ragged batch out over ``cp_size`` ranks. Pure and deterministic: call it on every rank alike.

    >>> import cpattn
    >>> p = cpattn.plan([(0, 10), (64, 1), (5, 0)], cp_size=2)
    >>> p.rank_tokens
    (6, 5)
    >>> p.chunks[0]
    Chunk(request=0, start=0, length=3, rank=0)

    Args:
        batch: (prefix_len, extend_len) of each request, in tokens, integers >= 0: how many tokens lie in the KV cache
            already, and how many are new. No requests, requests with nothing new, and requests shorter than
            2 * cp_size are all legal.
        cp_size: number of ranks, at least 1.
        partition: ``"zigzag"`` cuts each request into 2 * cp_size chunks and gives rank r chunks r and
            2 * cp_size - 1 - r, so that causal work is even. ``"contiguous"`` cuts it into cp_size chunks. ``"whole"`` leaves
            each request whole on one rank, and cuts, by zigzag, as few as it needs to keep ranks even: in tokens to within
            one, and in query-key pairs to within 2% of the mean where the batch allows it. ``"uncut"`` leaves every request
            whole, however uneven ranks are then. ``"auto"`` is whichever of whole and zigzag is estimated to take less for a
            layer's attention on the slowest rank: the plan's ``partition`` says which. Or a function of your own: it is called
            with the batch as int64 ``[n, 2]`` and cp_size, and returns :class:`Chunks`, the same on every rank.
        remainder: where the tokens go that a division into equal chunks leaves over. ``"balanced"``: any two ranks
            differ by at most one token over the whole batch. ``"first"``: to the first chunks of each request; of zigzag
            and contiguous alone.
        pad_to: physical rows are a multiple of this.
        prefix_shards: None if every rank holds every prefix. Else, for each request, how many of its prefix tokens each
            rank holds (``cp_size`` integers whose sum is prefix_len): a sharded cache. Left-over new tokens, or whole
            requests and decodes, are then dealt so that they go to ranks which hold few of their requests.
        prefix_ranks: instead of prefix_shards, for each request the rank that holds each of its prefix tokens, in the order of the
            sequence: ``prefix_len`` integers. So positions are known, windows work over the cache, and :func:`relayout` moves it.
            The new tokens' ranks to append are in ``chunk_table``; a :class:`KVPool` keeps all of this.
        owner: instead of both, the rule by which a sharded cache's tokens lie on ranks, prefix and new ones alike:
            :class:`Striped`. None if every rank keeps all, or what it computes.
        queries: ``"rows"``: each rank has the queries of its rows, in all heads. ``"all"``: each has those of all new tokens, in its
            share of the heads, as tensor parallelism leaves them, while keys are split by tokens over a sharded cache (decode
            context parallelism; Helix, arXiv:2507.07120). Then every rank has all rows, :func:`shard` and :func:`unshard` have
            nothing to move, and what the partition says is who keeps which new token, unless the owner does.
        problem: of ``"auto"`` alone: what the calls ask for, the same on every rank; ``device``, ``dtype`` and ``rows`` count only for
            sizes. None for 32 query and 8 key/value heads of 128 in bf16, with keys and values in order or packed.
        machine: of ``"auto"`` alone: a :class:`Machine`, or the name of one of :data:`cpattn.MACHINES`, the same on every rank. All
            backends count that it has constants for: :func:`machine_for` has those that can serve here. None for ``"h100-nvlink"``
            with ``triton``.
        token_cost: of ``"auto"`` alone: what the rest of a layer pays for a token, in query-key pairs, an integer of at least 0. With it
            evenness in tokens gives way where that is faster, and ``"uncut"`` is one more to choose from, but over sharded caches.

    Raises:
        BatchError: not integer pairs, or a negative length.
        PlanError: an option out of its range; a partition of your own returned no layout of the batch.
        UnknownNameError: there is no machine of that name.
        OptionError: problem, machine or token_cost are something else, or ask for what no call could.
    """
    if not (isinstance(partition, str) and partition == AUTO):
        _refuse_beside(partition, problem=problem, machine=machine, token_cost=token_cost)
        return Plan(batch, cp_size, partition, remainder, pad_to, prefix_shards, owner, prefix_ranks, queries)  # type: ignore[arg-type]
    if remainder != REMAINDERS[0]:
        raise PlanError(f"remainder={shown(remainder)} beside partition='auto', which goes with 'balanced' alone; leave it out")
    choice = AutoChoice.of(problem, machine, token_cost)
    names = choice.names(any(given is not None for given in (prefix_shards, prefix_ranks, owner)))
    checked = CheckedBatch.of(batch)
    return choice.cheapest(
        names,
        lambda name: Plan(checked, cp_size, name, remainder, pad_to, prefix_shards, owner, prefix_ranks, queries),  # type: ignore[arg-type]
    )


@leaves_graph
def required_rows(
    batch: Sequence[tuple[int, int]] | Sequence[Request] | npt.NDArray[Any],
    cp_size: int,
    *,
    partition: str | Partition = "zigzag",
    remainder: str = "balanced",
    pad_to: int = 1,
    owner: Striped | None = None,
    queries: str = "rows",
    problem: Problem | None = None,
    machine: Machine | str | None = None,
    token_cost: int | None = None,
) -> int:
    """The physical rows that each rank would have, for an engine that sizes its buffers or picks a bucket.

    With whole and auto, and with the balanced remainder of zigzag and contiguous, it is the batch's new tokens divided by
    ``cp_size``, rounded up, and nothing else is worked out. With ``queries="all"`` they are all new tokens of the batch. How the
    cache lies on ranks changes nothing, but that with ``token_cost`` no request is left uncut where it is sharded: ``owner`` says that it
    is, by whatever rule. Arguments and errors as in :func:`plan`.

    >>> import cpattn
    >>> cpattn.required_rows([(0, 10), (64, 1)], cp_size=4, pad_to=8)
    8
    >>> cpattn.required_rows([(0, 10), (64, 1)], cp_size=4, pad_to=8, queries="all")
    16
    """
    sizes = {"cp_size": cp_size, "pad_to": pad_to}
    if owner is not None:
        parse_owner(owner)
    even = isinstance(partition, str) and partition in (AUTO, *CANDIDATES, *OWNERS)
    usual = problem is None and machine is None and token_cost is None
    known = isinstance(queries, str) and queries in QUERIES
    of_all = known and queries == "all"
    if even and usual and known and remainder == "balanced" and all(map(is_size, sizes, sizes.values())):
        pairs = parse_batch(batch)
        # Integers of numpy may be too narrow for what is computed with them.
        ranks, multiple = int(cp_size), int(pad_to)
        tokens = int(pairs[:, 1].sum())
        rows = -(-tokens // (multiple if of_all else ranks * multiple)) * multiple
        if ranks * rows <= MAX_TOKENS and ranks * len(pairs) <= MOST_SHARES:
            return rows
    # The plan does what is left, and says what is wrong. Queries of all tokens want a sharded cache, whatever its rule.
    options: dict[str, Any] = {"partition": partition, "remainder": remainder, "pad_to": pad_to, "queries": queries}
    options |= {"problem": problem, "machine": machine, "token_cost": token_cost, "owner": Striped() if of_all else owner}
    return plan(batch, cp_size, **options).rows


@leaves_graph
def build_metadata(
    batch: Sequence[tuple[int, int]] | Sequence[Request] | npt.NDArray[Any],
    cp_size: int,
    cp_rank: int,
    device: torch.device | str = "cpu",
    *,
    partition: str | Partition = "zigzag",
    remainder: str = "balanced",
    pad_to: int = 1,
    prefix_shards: Sequence[Sequence[int]] | npt.NDArray[Any] | None = None,
    prefix_ranks: Sequence[Sequence[int]] | Sequence[npt.NDArray[Any]] | PrefixRanks | None = None,
    owner: Striped | None = None,
    queries: str = "rows",
    bucket: Bucket | None = None,
) -> CPMetadata:
    """:func:`plan` and :meth:`Plan.metadata` in one call; the arguments and errors are theirs.

    >>> import cpattn
    >>> cpattn.build_metadata([(0, 8)], cp_size=2, cp_rank=1).position_ids
    tensor([2, 3, 4, 5])
    """
    options: dict[str, Any] = {"partition": partition, "remainder": remainder, "pad_to": pad_to, "queries": queries}
    planned = plan(batch, cp_size, **options, prefix_shards=prefix_shards, prefix_ranks=prefix_ranks, owner=owner)
    return planned.metadata(cp_rank, device, bucket)


def _refuse_beside(partition: Any, **given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise PlanError(
                f"{name}= beside partition={shown(partition)}, which does not look at it; leave it out, or pass partition='auto'"
            )


def _check_bucket(bucket: Any, else_pass: str) -> None:
    if not isinstance(bucket, Bucket):
        raise PlanError(f"bucket is a {type(bucket).__name__}; pass a cpattn.Bucket(max_requests, max_rows, max_chunks), {else_pass}")
