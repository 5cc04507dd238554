"""An all-gather of keys in two levels, for a group over several hosts: each row crosses to every other host once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cpattn.byte_sizes import in_words
from cpattn.errors import OptionError, UnsupportedError, shown
from cpattn.exchange.all_gather import ALL_GATHER, explain_gathered
from cpattn.exchange.attend import Attend
from cpattn.exchange.key_order import Ordered
from cpattn.exchange.keys_at_hand import WholePages
from cpattn.exchange.keys_in_order import OrderedKeys
from cpattn.exchange.message import KVFormat, Message
from cpattn.exchange.needed_on_hosts import NeededOnHosts
from cpattn.exchange.page_rows import Places, write_rows
from cpattn.exchange.schedule import Schedule
from cpattn.exchange.seen_keys import gathered_rows_seen
from cpattn.exchange.strategy import IO, Prepared, Setup, Strategy
from cpattn.exchange.traveling_keys import traveling_keys
from cpattn.kv_cache import PagedKV
from cpattn.metadata.batch import is_integer
from cpattn.metadata.cp_metadata import CPMetadata
from cpattn.metadata.layout import Layout
from cpattn.metadata.needed_by_hosts import Crossing, crossing_rows
from cpattn.moves.moves import Moves, moves_for
from cpattn.problem import Problem
from cpattn.transports.transfer import Transfer
from cpattn.transports.transport import Transport
from cpattn.transports.two_levels import prepare_two_level_all_gather


@dataclass(frozen=True, repr=False)
class TwoLevel(Strategy):
    """What :func:`two_level` makes.

    Attributes:
        within: the ranks of a host.
    """

    within: int = 1

    def __repr__(self) -> str:
        return self.name

    def served_by(self, plan: Layout) -> Strategy:
        """An all-gather, where there is one host, or each has one rank."""
        return ALL_GATHER if self.within in (1, plan.cp_size) else self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as what it was made from: the same object again."""
        return two_level, (self.within,)


def two_level(within: int) -> Strategy:
    """An all-gather for a group over several hosts, for ``strategy=``: what crosses hosts crosses once.

    Each rank gathers the keys and values of those ranks that have its place in the other hosts, and then all ranks of a host gather
    what each of them has. So of each row one copy crosses to every other host, and the fast links within a host carry the rest.
    Rank r is on host ``r // within``.

    >>> import cpattn, torch
    >>> plan = cpattn.plan([(0, 40)], cp_size=4)
    >>> q, k = torch.randn(40, 4, 8), torch.randn(40, 2, 8)
    >>> def program(group):
    ...     meta = plan.metadata(group.rank)
    ...     q_local, k_local = (cpattn.shard(x, meta) for x in (q, k))
    ...     out = cpattn.cp_attention(q_local, k_local, k_local, meta, group=group, strategy=cpattn.two_level(within=2))
    ...     return cpattn.unshard(out, meta, group=group)
    >>> whole = cpattn.testing.run_loopback(program, size=4)[0]
    >>> alone = cpattn.cp_attention(q, k, k, cpattn.build_metadata([(0, 40)], 1, 0))
    >>> bool((whole - alone).abs().max() < 1e-5)
    True

    Where ``"all_gather"`` sends what is needed alone, so does this: to a host what its ranks' queries see, and to each of them what its own
    see. A result has the bits that it has with ``"all_gather"``.

    Args:
        within: the ranks of a host, a divisor of ``cp_size``. With 1, or all ranks, it is ``"all_gather"``.

    Returns:
        A Strategy, the same object for the same argument.

    Raises:
        OptionError: within is no integer of at least 1.
    """
    given: Any = within
    if not is_integer(given) or given < 1:
        raise OptionError(f"within={shown(given)}; pass the ranks of a host, an integer of at least 1")
    return _made(int(given))


@cache
def _made(within: int) -> TwoLevel:
    return TwoLevel(
        f"two_level({within})",
        schedule=partial(_schedule, within),
        prepare=partial(_prepare, within),
        forward=_forward,
        why_not=partial(_why_not, within),
        travels="keys and values: across hosts once, then within each",
        why_not_over=partial(_why_not_over, within),
        expands=True,
        stored=True,
        within=within,
    )


def has_levels(within: int, problem: Problem, plan: Layout) -> bool:
    """Whether anything travels, over more than one host of more than one rank."""
    travels = traveling_keys(problem, plan)
    # Pages that every rank holds whole want what no query sees, too.
    return 1 < within < plan.cp_size and bool(travels.what != "nothing" or travels.rest)


def needed_on_hosts(within: int, problem: Problem, plan: Layout) -> Crossing | None:
    """What is sent, where that is what is needed alone; else None."""
    if problem.cache == "paged" or traveling_keys(problem, plan).what != "needed":
        return None
    return crossing_rows(plan, problem.window, within)


def _schedule(within: int, problem: Problem, plan: Layout) -> Schedule:
    (hop,) = ALL_GATHER.schedule(problem, plan)
    if not has_levels(within, problem, plan):
        return (hop,)
    needed = needed_on_hosts(within, problem, plan)
    if needed is not None:
        return (hop._replace(sent=(needed.sent_across + needed.sent_within) * problem.key_bytes),)
    # Of the other hosts' ranks in its place a rank gets one message each, and sends as many; within, what each of them has.
    return (hop._replace(sent=np.full(plan.cp_size, (plan.cp_size - 1) * problem.rows * problem.key_bytes)),)


def explain_levels(strategy: TwoLevel, problem: Problem, plan: Layout) -> str:
    """How many keys cross hosts, and how many come from ranks of one's own, with the bytes of the rank that receives the most."""
    within = strategy.within
    if not has_levels(within, problem, plan):
        return explain_gathered(problem, plan)
    needed, why = needed_on_hosts(within, problem, plan), traveling_keys(problem, plan).why
    if needed is None:
        hosts, row = plan.cp_size // within, problem.rows * problem.key_bytes
        across, inside = (in_words(rows * row) for rows in (hosts - 1, plan.cp_size - hosts))
        if problem.cache == "paged":
            why = "pages that every rank holds whole want all of them"
        elif traveling_keys(problem, plan).what == "needed":
            why = "there are too many ranks and chunks to work out more"
        return f"a rank receives {across} from other hosts, where each row crosses once, and {inside} from ranks of its own: {why}"
    across, inside = (in_words(int(rows.max()) * problem.key_bytes) for rows in (needed.received_across, needed.received_within))
    return (
        f"a rank receives at most {across} from other hosts, where what queries of a host see crosses once, and at most {inside} from "
        f"ranks of its own: {why}"
    )


class _TwoLevels(NamedTuple):
    """
    Attributes:
        own: this rank's rows among all; all: place after place, and of each place host after host.
        ordered: memory for keys in order, and source: where each comes from; None where they are attended to in pages.
        pages: those; places: of all rows in pages, where there are any.
    """

    transfers: tuple[Transfer, ...]
    own: Tensor
    all: Message
    num_tokens: int | Tensor
    ordered: OrderedKeys | None
    source: Tensor | None
    pages: WholePages | None
    places: Places | None
    kv: KVFormat
    moves: Moves


def _prepare(within: int, setup: Setup) -> Prepared:
    problem, meta, transport, kv = setup.problem, setup.meta, setup.transport, setup.kv
    if not has_levels(within, problem, meta.plan):
        return ALL_GATHER.prepare(setup)
    if needed_on_hosts(within, problem, meta.plan) is not None:
        needed = NeededOnHosts.of(setup, within)
        if needed is not None:
            return needed
    hosts = transport.size // within
    shape = within, hosts, problem.rows, kv.heads, kv.width
    memory = transport.arena.buffer("two levels", shape, kv.wire_dtype, kv.device)
    own = memory[transport.rank % within, transport.rank // within]
    transfer = prepare_two_level_all_gather(transport, within, memory)._replace(fill_missing=partial(kv.fill_missing_, own))
    is_paged = problem.cache == "paged"
    in_pages = is_paged and not setup.writes_pages_after(problem, meta.plan)
    ordered = Ordered.SEEN if is_paged else setup.ordered
    window, leaves_own = problem.window, ordered.leaves_own
    return _TwoLevels(
        transfers=(transfer,),
        own=own,
        all=Message.of(memory.flatten(0, 2), kv),
        num_tokens=setup.num_tokens,
        ordered=None if in_pages else OrderedKeys.of(setup, kv, ordered),
        source=None
        if in_pages
        else meta.derive(("two levels", within, window, leaves_own), lambda: _source(meta, window, within, leaves_own)),
        pages=WholePages.of(setup, kv) if in_pages else None,
        places=meta.derive(("places in two levels", within), lambda: _places(meta, within)) if is_paged else None,
        kv=kv,
        moves=moves_for(problem.device),
    )


def _source(meta: CPMetadata, window: int | None, within: int, leaves_own: bool) -> Tensor:
    """Where each row that is seen lies; a negative entry stands for zeros."""
    index = gathered_rows_seen(meta, window, leaves_own)
    rank, row = index // max(1, meta.rows), index % max(1, meta.rows)
    hosts = meta.plan.cp_size // within
    place: Tensor = ((rank % within) * hosts + rank // within) * meta.rows + row
    return torch.where(index < 0, index, place.to(index.dtype))


def _places(meta: CPMetadata, within: int) -> tuple[Tensor, Tensor]:
    """The request and the position of each row, as they lie."""
    request, position = (
        table.view(meta.plan.cp_size // within, within, meta.rows).transpose(0, 1).flatten() for table in meta.gathered_places
    )
    return request, position


def _forward(held: _TwoLevels | NeededOnHosts | Prepared, io: IO, attend: Attend) -> None:
    if isinstance(held, NeededOnHosts):
        held.forward(io, attend)
        return
    if not isinstance(held, _TwoLevels):
        ALL_GATHER.forward(held, io, attend)
        return
    held.moves.pack(held.own, io.k, io.v, held.num_tokens)
    work, ordered = io.start(), held.ordered
    if ordered is not None and ordered.order.prefix_places is not None:
        # It is there, and the new keys are still on their way.
        ordered.put_prefix(io, None)
    work.wait()
    if ordered is not None:
        assert held.source is not None  # beside it
        ordered.put_new(held.all.whole, held.source)
        attend(ordered.keys(io, None), ordered.spans)
    if held.places is not None:
        assert isinstance(io.cache, PagedKV)
        write_rows(held.kv, io.cache, held.places, *held.all.parts)
        if held.pages is not None:
            attend(held.pages.keys(io.cache), held.pages.spans)


def _why_not(within: int, problem: Problem, plan: Layout) -> str | None:
    if plan.cp_size % within:
        return f"it has hosts of {within} ranks, and cp_size={plan.cp_size} is no multiple of that"
    if plan.sharded and 1 < within < plan.cp_size:
        return "it would bring the whole of a sharded cache to every rank"
    return ALL_GATHER.why_not(problem, plan)


def _why_not_over(within: int, transport: Transport) -> str | None:
    if within in (1, transport.size):
        return None
    try:
        transport.split(transport.size // within, within)
    except UnsupportedError as error:
        return str(error)
    return None
