"""How queries come to the ranks whose keys they see, and their results back: of each query no more often than it sees something."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from cpattn.device_tables import IntArray, exclusive_cumsum, expand_all
from cpattn.exchange.strategy import Setup
from cpattn.metadata.cp_metadata import CPMetadata
from cpattn.metadata.layout import Layout
from cpattn.metadata.needed_queries import queries_that_see
from cpattn.moves.moves import Moves, moves_for
from cpattn.transports.rows_of_all import RowsOfPeers
from cpattn.transports.transfer import Transfer


class QueryTables(NamedTuple):
    """Of one rank; index tensors are int32 on its device. Rows lie source after source, or owner after owner, in the order of chunks.

    Attributes:
        sent, received: queries to and from each rank, ``[cp_size]``.
        outgoing ``[sum(sent)]``: its own queries that go out; gathered ``[sum(received)]``: those that come, among all ranks' rows.
        numbers ``[sum(sent)]``: in turn.
        slots ``[sum(sent)]``: where their results go in ``[owners * rows]``, of those owners that have any of them.
        results ``[sum(sent)]``: where these are among all ranks' results, of which each has as many as the one with the most.
        owners: how many there are.
    """

    sent: tuple[int, ...]
    received: tuple[int, ...]
    outgoing: Tensor
    gathered: Tensor
    numbers: Tensor
    slots: Tensor
    results: Tensor
    owners: int

    @classmethod
    def of(cls, meta: CPMetadata, window: int | None, between: IntArray) -> QueryTables:
        """For the queries that travel ``between`` ranks, ``[source, owner]``."""

        def build() -> QueryTables:
            plan: Layout = meta.plan
            mine, size, rows = meta.cp_rank, plan.cp_size, plan.chunk_rows
            sent, own = between[mine], plan.by_rank.entries(mine)
            length = np.stack([queries_that_see(plan, window, owner)[own] for owner in range(size)])
            order = plan.by_rank.order
            of_source = queries_that_see(plan, window, mine)[order]
            used = sent > 0
            number = exclusive_cumsum(used.astype(np.int64))
            first = np.tile(rows[own], (size, 1))
            # At an owner this rank's lie behind those of the ranks before it.
            most, before = int(between.sum(axis=0).max()), between[:mine].sum(axis=0)
            tables = expand_all(
                {
                    "outgoing": (first.ravel(), length.ravel()),
                    "gathered": (plan.chunk_table.rank[order] * meta.rows + rows[order], of_source),
                    "numbers": (np.zeros(1, dtype=np.int64), sent.sum(keepdims=True)),
                    "slots": ((first + (number * meta.rows)[:, None]).ravel(), length.ravel()),
                    "results": (np.arange(size) * most + before, sent),
                },
                meta.device,
            )
            return cls(tuple(sent.tolist()), tuple(between[:, mine].tolist()), **tables, owners=int(used.sum()))

        return meta.derive(("query tables", window), build)


class QueryRows(Protocol):
    """One call's use: ``put`` the queries, start ``there`` and wait for it; ``queries``; ``put_results``, start ``back`` and wait for it;
    ``results``."""

    @property
    def there(self) -> Transfer:
        """That brings the queries."""

    @property
    def back(self) -> Transfer:
        """That brings the results."""

    def put(self, q: Tensor) -> None:
        """Of this rank, ``[rows, Hq, D]``."""

    def queries(self) -> Tensor:
        """Of others, ``[n, Hq, D]``."""

    def put_results(self, out: Tensor, lse: Tensor) -> None:
        """Of those, ``[n, Hq, Dv]`` and ``[n, Hq]``."""

    def results(self) -> tuple[Tensor, Tensor]:
        """Of this rank's queries, ``[owners, rows, Hq, Dv]`` and ``[owners, rows, Hq]``, with LSE -inf for those that were not there."""


class ReturnedRows(NamedTuple):
    """Memory for results of this rank's queries from several owners.

    Attributes:
        whole: ``[owners, rows, Hq, Dv + 1]``, LSE in the last column.
    """

    whole: Tensor
    moves: Moves

    @classmethod
    def of(cls, setup: Setup, name: str, owners: int) -> ReturnedRows:
        problem = setup.problem
        shape = owners, problem.rows, problem.q_heads, problem.v_head_dim + 1
        return cls(setup.transport.arena.buffer(name, shape, problem.merge_dtype, problem.device), moves_for(problem.device))

    @property
    def flat(self) -> Tensor:
        """Once nobody has seen anything."""
        self.whole[..., -1].fill_(-torch.inf)
        return self.whole.flatten(0, 1)

    @property
    def partials(self) -> tuple[Tensor, Tensor]:
        """As they are merged."""
        return self.whole[..., :-1], self.whole[..., -1]


def put_in(message: Tensor, out: Tensor, lse: Tensor) -> None:
    """Results and their LSE into ``[n, Hq, Dv + 1]``."""
    message[..., :-1].copy_(out)
    message[..., -1].copy_(lse)


class SentQueries(NamedTuple):
    """:class:`QueryRows` over collectives.

    Attributes:
        own: this rank's queries; message: those that go out; arrived: that come.
        sent, received: results.
    """

    there: Transfer
    back: Transfer
    table: QueryTables
    own: Tensor
    message: Tensor
    arrived: Tensor
    sent: Tensor
    received: Tensor
    returned: ReturnedRows
    moves: Moves

    @classmethod
    def of(cls, setup: Setup, table: QueryTables) -> SentQueries | None:
        """None where the transport cannot send such messages."""
        problem, transport = setup.problem, setup.transport
        many_out, many_in = sum(table.sent), sum(table.received)

        def buffer(name: str, rows: int, width: int, dtype: torch.dtype) -> Tensor:
            return transport.arena.buffer(name, (rows, problem.q_heads, width), dtype, problem.device)

        own = buffer("queries", problem.rows, problem.head_dim, problem.dtype)
        message, arrived = (
            buffer(name, rows, problem.head_dim, problem.dtype) for name, rows in (("queries out", many_out), ("queries in", many_in))
        )
        sent, received = (
            buffer(name, rows, problem.v_head_dim + 1, problem.merge_dtype)
            for name, rows in (("results sent", many_in), ("results received", many_out))
        )
        there = transport.prepare_uneven_all_to_all(arrived, message, table.received, table.sent)
        back = transport.prepare_uneven_all_to_all(received, sent, table.sent, table.received)
        if there is None or back is None:
            return None
        return cls(
            there=there._replace(fill_missing=partial(message.fill_, torch.nan)),
            back=back._replace(fill_missing=partial(sent.fill_, torch.nan)),
            table=table,
            own=own,
            message=message,
            arrived=arrived,
            sent=sent,
            received=received,
            returned=ReturnedRows.of(setup, "results of owners", table.owners),
            moves=moves_for(problem.device),
        )

    def put(self, q: Tensor) -> None:
        """See :class:`QueryRows`, as for the others."""
        if len(self.message):
            self.own.copy_(q)
            self.moves.gather_rows(self.message, self.own, self.table.outgoing)

    def queries(self) -> Tensor:
        return self.arrived

    def put_results(self, out: Tensor, lse: Tensor) -> None:
        put_in(self.sent, out, lse)

    def results(self) -> tuple[Tensor, Tensor]:
        if self.table.owners:
            self.moves.gather_rows(self.returned.flat, self.received, self.table.numbers, self.table.slots)
        return self.returned.partials


class ReadQueries(NamedTuple):
    """:class:`QueryRows` in the memory of peers: each rank reads the queries that see its keys, and the results of its own.

    Attributes:
        rows: all ranks' queries; arrived: those that are read.
        result_rows: all ranks' results; sent: of this rank.
    """

    rows: RowsOfPeers
    result_rows: RowsOfPeers
    there: Transfer
    back: Transfer
    table: QueryTables
    arrived: Tensor
    sent: Tensor
    returned: ReturnedRows

    @classmethod
    def of(cls, setup: Setup, table: QueryTables, most: int) -> ReadQueries | None:
        """None where ranks cannot read each other's memory.

        Args:
            most: queries that come to the rank to which the most come.
        """
        problem, transport = setup.problem, setup.transport
        many_out, many_in = sum(table.sent), sum(table.received)
        of_rows, of_results = (problem.rows, problem.q_heads, problem.head_dim), (most, problem.q_heads, problem.v_head_dim + 1)
        rows = transport.rows_of_all(of_rows, problem.dtype, problem.device, _fill_with_nan)
        results = None if rows is None else transport.rows_of_all(of_results, problem.merge_dtype, problem.device, _fill_with_nan)
        if rows is None or results is None:
            return None
        buffer = transport.arena.buffer
        return cls(
            rows=rows,
            result_rows=results,
            there=rows.transfer._replace(nbytes=many_out * problem.query_bytes),
            back=results.transfer._replace(nbytes=many_in * problem.result_bytes),
            table=table,
            arrived=buffer("queries in", (many_in, *of_rows[1:]), problem.dtype, problem.device),
            sent=buffer("results sent", (many_in, *of_results[1:]), problem.merge_dtype, problem.device),
            returned=ReturnedRows.of(setup, "results of owners", table.owners),
        )

    def put(self, q: Tensor) -> None:
        """See :class:`QueryRows`, as for the others."""
        self.rows.put(q, None, len(q))

    def queries(self) -> Tensor:
        if len(self.arrived):
            self.rows.gather(self.arrived, self.table.gathered, None)
        return self.arrived

    def put_results(self, out: Tensor, lse: Tensor) -> None:
        put_in(self.sent, out, lse)
        self.result_rows.put(self.sent, None, len(self.sent))

    def results(self) -> tuple[Tensor, Tensor]:
        if self.table.owners:
            self.result_rows.gather(self.returned.flat, self.table.results, self.table.slots)
        return self.returned.partials


def query_rows(setup: Setup, between: IntArray) -> QueryRows | None:
    """By the way that there is; None where there is none."""
    table = QueryTables.of(setup.meta, setup.problem.window, between)
    return ReadQueries.of(setup, table, int(between.sum(axis=0).max())) or SentQueries.of(setup, table)


def _fill_with_nan(message: Tensor) -> None:
    message.fill_(torch.nan)
