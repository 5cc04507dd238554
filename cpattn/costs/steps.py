"""What one call of a strategy does, step by step, in seconds: it attends, moves rows within a GPU, and sends.

Each function follows the ``forward`` of its strategy, and takes from the strategy's schedule who attends to what, and how many bytes
travel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np

from cpattn.attention.backend import Backend
from cpattn.costs.hop_spans import sample
from cpattn.costs.launches import Launches
from cpattn.exchange.divided_heads import DividedHeads, busiest_share, shares_of
from cpattn.exchange.heads_message import Widths
from cpattn.exchange.helix import HELIX, RESIDENT_HELIX
from cpattn.exchange.late_pages import may_come_late
from cpattn.exchange.new_keys_alone import nothing_is_cached
from cpattn.exchange.pass_q_with_new_keys import brings_new_keys
from cpattn.exchange.resident import RESIDENT
from cpattn.exchange.resident_shards import RESIDENT_SHARDS
from cpattn.exchange.ring_keys import ring_keys
from cpattn.exchange.schedule import Hop, Schedule, num_results
from cpattn.exchange.strategy import Strategy
from cpattn.exchange.traveling_keys import Traveling, traveling_keys
from cpattn.exchange.traveling_queries import traveling_queries
from cpattn.exchange.two_level import TwoLevel, needed_on_hosts
from cpattn.expansion import head_groups
from cpattn.kernels.tile_shapes import has_specialized
from cpattn.keys import PREFIX_UNIT
from cpattn.machine import KernelCosts, LinkCosts, Machine
from cpattn.metadata.layout import Layout
from cpattn.metadata.needed_keys import View
from cpattn.metadata.united import united_layout
from cpattn.problem import Problem

# Kernels that expand a group of heads: of the keys, of the values, and of the part of a key that heads share.
_PRODUCTS = 3


class Choice(NamedTuple):
    """What is estimated.

    Attributes:
        link: what carries the messages; transport: its name.
        kernel: the backend's constants; attention: how long its launches take.
        results: partial results of each query, of the schedule.
    """

    plan: Layout
    problem: Problem
    machine: Machine
    schedule: Schedule
    transport: str
    link: LinkCosts
    backend: Backend
    kernel: KernelCosts
    attention: Launches
    results: int


@dataclass
class Tally:
    """What steps add up to, in seconds; and the launches."""

    choice: Choice
    compute: float = 0.0
    moves: float = 0.0
    transfer: float = 0.0
    exposed: float = 0.0
    host: float = 0.0
    launches: int = 0

    @property
    def seconds(self) -> float:
        """Of the device."""
        return self.compute + self.moves + self.exposed

    def move(self, nbytes: int, launches: int = 1) -> None:
        """Kernels that read and write so many bytes, both counted."""
        machine = self.choice.machine
        self.moves += launches * machine.launch + nbytes / machine.copy
        self.host += launches * machine.host_launch
        self.launches += launches

    def move_rows(self, rows: int, groups: int, launches: int = 1) -> None:
        """The K and V of so many tokens, of one of so many groups of heads; none without any."""
        if rows:
            self.move(2 * rows * self.choice.problem.key_bytes // groups, launches)

    def attend(self, *hops: Hop, groups: int = 1, over_pages: bool = False) -> list[float]:
        """The launches of hops between which ranks do not wait for each other, over one of so many groups of heads, in pages or not.
        Returns the seconds of each on the slowest rank."""
        choice = self.choice
        slowest = [choice.attention.slowest(hop, choice.kernel, groups, over_pages) for hop in hops]
        if len(hops) == 1:
            self.compute += slowest[0]
        else:
            seconds = [choice.attention.seconds(hop, choice.kernel, groups, over_pages) for hop in hops]
            self.compute += float(np.sum(seconds, axis=0).max(initial=0))
        self.host += choice.kernel.host * len(hops)
        self.launches += len(hops)
        return slowest if not choice.problem.expands else [one + self._expand(hop) for one, hop in zip(slowest, hops, strict=True)]

    def _expand(self, hop: Hop) -> float:
        """Seconds of expanding a hop's latents, as if each head took a product with all of a row: a group of heads at a time, each with a
        launch of its own."""
        choice, problem = self.choice, self.choice.problem
        assert problem.latent_dim is not None  # it expands
        num_keys = latents_of(choice.plan, problem, hop)
        groups, numbers = len(head_groups(problem, num_keys)), num_keys * problem.q_heads * (problem.head_dim + problem.v_head_dim)
        # What is written is written beside the products.
        seconds = numbers * max(2 * problem.latent_dim / choice.kernel.flops, problem.dtype.itemsize / choice.machine.copy)
        more = groups - 1
        seconds += groups * _PRODUCTS * choice.machine.launch + more * choice.kernel.overhead
        self.compute += seconds
        self.host += groups * _PRODUCTS * choice.machine.host_launch + more * choice.kernel.host
        self.launches += groups * _PRODUCTS + more
        return seconds

    def gather(self, nbytes: int, cover: float = 0.0, *, comes_late: bool = False) -> None:
        """An all-gather in which a rank receives so many bytes, beside so many seconds of attention, which may wait for each of them. One
        of parts that are needed takes no longer, and the host starts it as fast."""
        link, plan = self.choice.link, self.choice.plan
        seconds, latency, hides = link.gather_seconds(nbytes, plan.cp_size - 1, _Most.of(plan).share), link.latency, link.hides_gather
        if comes_late and nbytes:
            seconds, latency, hides = seconds + link.late_latency, latency + link.late_latency, link.hides_late
        self._send(seconds, latency, link.host_gather, hides, cover)

    def gather_parts(self, nbytes: int, cover: float = 0.0) -> None:
        """The same of parts for one rank each, from point to point, which the host starts as slowly as shifts."""
        link = self.choice.link
        self._send(link.gather_seconds(nbytes), link.latency, link.host_shift, link.hides_gather if cover else 0.0, cover)

    def shift(self, nbytes: int, cover: float) -> None:
        """A message to the next rank, beside so many seconds of attention."""
        link = self.choice.link
        self._send(
            link.shift_seconds(nbytes, self.choice.plan.cp_size - 1), link.latency_of_shift, link.host_shift, link.hides_shift, cover
        )

    def _send(self, seconds: float, latency: float, host: float, hides: float, cover: float) -> None:
        if seconds:
            self.transfer += seconds
            self.exposed += seconds - hides * min(max(0.0, seconds - latency), cover)
            self.host += host
            self.launches += 1

    def cover(self, launches: Sequence[float]) -> float:
        """Seconds of attention beside which a message travels that sets out before these launches. One that kernels carry finds no
        multiprocessor free before the first of them ends, if its programs stay until then."""
        waits = self.choice.link.by_kernels and self.choice.kernel.stays
        return sum(launches[1:] if waits else launches)

    def add(self, other: Tally, count: int) -> None:
        """Adds what was tallied elsewhere, so many times."""
        self.compute += count * other.compute
        self.moves += count * other.moves
        self.transfer += count * other.transfer
        self.exposed += count * other.exposed
        self.host += count * other.host
        self.launches += count * other.launches


def latents_of(plan: Layout, problem: Problem, hop: Hop) -> int:
    """How many of them the queries of a hop see, on the rank that has the most; of the shards that visit it, no more than one has."""
    view = View.of(plan, None if problem.fixed else problem.window)
    if hop.keys == "prefix":
        return int(view.prefix.max())
    if hop.keys == "new":
        return int(view.new.max())
    both = int((view.prefix + view.new).max())
    if hop.keys == "all":
        return both
    shard = plan.largest_shard if plan.sharded else problem.rows
    return min(both, shard) if isinstance(hop.queries, int) else shard


def all_gather(choice: Choice) -> Tally:
    """Pack, gather, put in order, attend: for each group of heads, of which all set out at once."""
    plan, problem, *_ = choice
    tally, groups = Tally(choice), problem.overlap
    (hop,) = choice.schedule
    if plan.sharded:
        return _new_keys_in_order(choice)
    traveling = traveling_keys(problem, plan)
    comes_late = keys_come_late(choice, traveling)
    if problem.cache == "paged" and comes_late:
        return _late_into_pages(tally, hop)
    over_pages = problem.cache == "paged"
    for group in range(groups):
        if problem.cache == "packed":
            tally.move_rows(_copied_prefix(choice), groups)
        if over_pages:
            _collect_into_pages(tally, traveling)
            _copy_pages(tally, _Most.of(plan).both // groups)
        else:
            _collect(tally, traveling, _Most.of(plan).new, comes_late=comes_late)
        (seconds,) = tally.attend(hop, groups=groups, over_pages=over_pages)
        rows = (
            traveling.needed if choice.transport == "peer_memory" and not over_pages else max(traveling.needed, int(traveling.sent.max()))
        )
        received = rows * problem.key_bytes // groups
        # What follows another is hidden as far as the attention to that one goes; nobody waits for it to begin.
        tally.gather(received, seconds if group or comes_late else 0.0, comes_late=comes_late)
        if group and received and choice.link.hides_gather:
            tally.exposed -= min(choice.link.latency, seconds)
        _rest_into_pages(tally, traveling, seconds)
        if groups > 1:
            # Into some heads of the result: a copy with strides, at half the speed.
            tally.move(4 * _outputs(choice) * problem.dtype.itemsize // groups)
    return tally


def _new_keys_in_order(choice: Choice) -> Tally:
    """Packed, gathered, written to the pages of those who hold them, put in order: with what a window reaches beside them, or alone."""
    tally, problem, (hop,) = Tally(choice), choice.problem, choice.schedule
    message = int(hop.sent.max(initial=0))
    tally.gather(message)
    tally.move(2 * message, launches=3)
    tally.move(2 * problem.rows * problem.key_bytes)
    tally.attend(hop)
    return tally


def keys_come_late(choice: Choice, traveling: Traveling) -> bool:
    """Whether the attention begins while others' keys still come: all heads at once, read from the memory of peers."""
    problem, kernel = choice.problem, choice.kernel
    if choice.transport != "peer_memory" or not (kernel.waits_for_keys and _has_hopper_kernel(choice)):
        return False
    if problem.cache == "paged":
        return kernel.reads_prefix and may_come_late(problem, choice.plan, traveling)
    return traveling.what != "nothing" and problem.overlap == 1


def _has_hopper_kernel(choice: Choice) -> bool:
    """That attends to keys in order, and to prefixes wherever they lie."""
    problem = choice.problem
    if problem.v_in_k or problem.expands or problem.stored_dtype != problem.dtype:
        return False
    return has_specialized(problem.head_dim, problem.v_head_dim, problem.dtype, choice.machine.capability, problem.page_size or 0)


def _late_into_pages(tally: Tally, hop: Hop) -> Tally:
    """All new keys come late into order, beside prefixes in pages, and are written there after the attention."""
    choice = tally.choice
    plan, key_bytes = choice.plan, choice.problem.key_bytes
    tally.move(2 * choice.problem.rows * key_bytes)
    if _Most.of(plan).beyond_units:
        tally.move_rows(_Most.of(plan).beyond_units, 1)
    (seconds,) = tally.attend(hop)
    tally.gather((plan.num_tokens - min(plan.rank_tokens)) * key_bytes, seconds, comes_late=True)
    tally.move_rows(plan.num_tokens, 1)
    return tally


def _copied_prefix(choice: Choice) -> int:
    """Tokens of packed prefixes that a rank copies in order: all that it sees, or what shares a block with new tokens."""
    if not (choice.kernel.reads_prefix and _has_hopper_kernel(choice)):
        return _Most.of(choice.plan).prefix
    return _Most.of(choice.plan).beyond_units


class _Most(NamedTuple):
    """What a plan has, in sums and maxima.

    Attributes:
        prefix, new, both: tokens that a rank has in view; see :class:`cpattn.metadata.needed_keys.View`.
        beyond_units: of prefixes the tokens that share a block with new ones.
        share: of the batch's new tokens those of its largest request: by what ranks, which all read keys in the same order, crowd at one
            of them. After the first request they have drifted apart.
    """

    prefix: int
    new: int
    both: int
    beyond_units: int
    share: float

    @classmethod
    def of(cls, plan: Layout) -> _Most:
        """Worked out once."""
        found: _Most | None = plan.memo.get("most")
        if found is None:
            view, share = View.of(plan), int(plan.extend_lens.max(initial=0)) / max(1, plan.num_tokens)
            prefix, new, both = (int(tokens.max()) for tokens in (view.prefix, view.new, view.prefix + view.new))
            found = plan.memo.keep("most", cls(prefix, new, both, int((plan.prefix_lens % PREFIX_UNIT).sum()), share))
        return found


def _collect(tally: Tally, traveling: Traveling, new: int, *, comes_late: bool) -> None:
    """New keys of a group of heads into and out of messages, and so many of them to their places."""
    choice, groups = tally.choice, tally.choice.problem.overlap
    if traveling.what == "nothing":
        if choice.problem.cache is not None:
            tally.move_rows(new, groups)
        return
    if comes_late:
        # One launch puts a rank's own rows where they are attended to, and others read them, and brings theirs. The attention is launched
        # as a dependent, and its first tiles wait.
        tally.move(2 * choice.problem.rows * choice.problem.key_bytes)
        return
    tally.move_rows(choice.problem.rows, groups)
    if choice.transport == "peer_memory":
        # What arrives goes straight to its place, and so do a rank's own rows.
        tally.move_rows(choice.problem.rows, groups, launches=2)
        return
    if traveling.what == "needed":
        tally.move_rows(int(traveling.sent.max()), groups)
    tally.move_rows(new, groups)


def _rest_into_pages(tally: Tally, traveling: Traveling, seconds: float) -> None:
    """What pages that every rank holds whole get beside or after an attention of so many seconds."""
    choice = tally.choice
    if not traveling.rest:
        return
    # Each rank receives all that others have, and sends as much: what it has less of before comes now.
    everything = choice.plan.num_tokens - min(choice.plan.rank_tokens)
    rows = max(0, everything - max(traveling.needed, int(traveling.sent.max())))
    tally.gather(rows * choice.problem.key_bytes // choice.problem.overlap, seconds)
    latency = choice.link.latency
    if choice.link.hides_gather:
        tally.exposed -= min(latency, seconds)
    elif traveling.what == "needed":
        # It is read again, and nobody is waited for.
        tally.exposed -= latency
        tally.transfer -= latency


def _collect_into_pages(tally: Tally, traveling: Traveling) -> None:
    """The same into pages that every rank holds whole: what is seen before the attention, and then the rest."""
    choice, groups = tally.choice, tally.choice.problem.overlap
    rows, is_sent_twice = choice.problem.rows, traveling.what == "needed"
    first = choice.plan.num_tokens if traveling.what == "all" else rows + traveling.needed
    if choice.plan.cp_size > 1:
        tally.move_rows(rows, groups)
    if choice.transport == "peer_memory":
        tally.move_rows(rows, groups, launches=3 if is_sent_twice else 2)
        return
    for sent in (traveling.sent, traveling.rest_sent) if is_sent_twice else ():
        tally.move_rows(int(sent.max()), groups)
    tally.move_rows(first, groups)
    tally.move_rows(traveling.rest, groups)


def ring(choice: Choice) -> Tally:
    """Keys go around, or come from their owners: each message travels beside the attention to the one before it, the first also beside
    prefixes."""
    plan, problem, _, schedule, *_ = choice
    own = next(number for number, hop in enumerate(schedule) if hop.keys == 0)
    first, hops = schedule[: own + 1], schedule[own:]
    tally, message = Tally(choice), problem.rows * problem.key_bytes if len(hops) > 1 else 0
    is_straight = ring_keys(problem, plan).straight
    if plan.sharded and problem.cache == "paged":
        tally.move(2 * plan.largest_shard * problem.key_bytes)
    elif message:
        tally.move(2 * message)
    if len(first) > 1 and problem.cache == "paged":
        _copy_pages(tally, plan.num_prefix_tokens)
    choice.attention.look_at([hops[0], *(hops[number] for number, _ in sample(1, len(hops)))])
    before = [
        seconds
        for number, hop in enumerate(first)
        for seconds in _attend_and_merge(tally, [hop], merges=number > 0, over_pages=hop.keys == "prefix" and problem.cache == "paged")
    ]
    _write_passing(tally)
    for number, count in sample(1, len(hops)):
        one = Tally(choice)
        launches, sent = _attend_and_merge(one, [hops[number]], merges=True), int(hops[number - 1].sent.max())
        if is_straight:
            # Taken out of the shard.
            one.move(2 * sent)
        one.shift(sent, tally.cover(before if number == 1 else launches))
        _write_passing(one)
        tally.add(one, count)
    return _finished(tally)


def pass_q(choice: Choice) -> Tally:
    """Gather queries beside the attention to one's own, attend with those of others, send results back, merge them."""
    if brings_new_keys(choice.problem, choice.plan):
        return (_new_keys_in_order if nothing_is_cached(choice.problem, choice.plan) else _pass_q_with_new_keys)(choice)
    tally = Tally(choice)
    _write_own(tally)
    return _over_own_keys(tally)


def resident(choice: Choice) -> Tally:
    """Attend to pages that have everything already."""
    tally, plan = Tally(choice), choice.plan
    _copy_pages(tally, _Most.of(plan).both)
    tally.attend(*choice.schedule, over_pages=True)
    return tally


def resident_shards(choice: Choice) -> Tally:
    """As pass_q, over shards in which new tokens lie already."""
    tally = Tally(choice)
    _copy_pages(tally, int(choice.plan.held_lens.sum(axis=0).max()))
    return _over_own_keys(tally)


def _over_own_keys(tally: Tally) -> Tally:
    """This rank's queries and those of others over the keys that it holds, and the results back."""
    choice = tally.choice
    plan, problem, _, schedule, *_ = choice
    # Who has few queries of its own goes on to those of others.
    launches = _attend_and_merge(tally, schedule, merges=False, over_pages=problem.cache == "paged")
    if schedule[-1].queries == "others" and problem.rows:
        *own, others = schedule
        results, sent = problem.rows * problem.result_bytes, int(others.sent.max())
        goes_to_all = sent == (plan.cp_size - 1) * results
        if len(own) > 1:
            _merge(tally)
        tally.move(2 * problem.rows * problem.query_bytes)
        if not goes_to_all:
            # Taken out of this rank's queries.
            tally.move(2 * int(own[-1].sent.max()))
        tally.gather(int(own[-1].sent.max()), tally.cover(launches[:-1]))
        _put(tally, plan.cp_size * results if goes_to_all else sent)
        tally.gather_parts(sent)
        tally.move((plan.cp_size + 2) * results if goes_to_all else 2 * sent + 3 * results)
    return _finished(tally)


def _pass_q_with_new_keys(choice: Choice) -> Tally:
    """New keys and values are gathered with the queries, and put in order for one's own, while results go back."""
    plan, problem, _, schedule, *_ = choice
    tally = Tally(choice)
    over_pages = problem.cache == "paged"
    *cached, new = schedule
    rows, results = plan.cp_size * problem.rows, problem.rows * problem.result_bytes
    tally.move(2 * problem.rows * (problem.query_bytes + problem.key_bytes), launches=2)
    _copy_pages(tally, int(plan.shard_lens.sum(axis=0).max()))
    launches = _attend_and_merge(tally, cached, merges=False, over_pages=over_pages)
    tally.gather(int(cached[0].sent.max()), tally.cover(launches[:-1]) if plan.cp_size > 1 else 0.0)
    tally.move(2 * rows * problem.key_bytes // plan.cp_size)
    tally.move(2 * rows * problem.key_bytes)
    own = _attend_and_merge(tally, [new], merges=True)
    if plan.cp_size > 1 and problem.rows:
        _put(tally, plan.cp_size * results)
        tally.gather_parts(int(new.sent.max()), tally.cover(own))
        tally.move((plan.cp_size + 2) * results)
    return _finished(tally)


def pass_q_ring(choice: Choice) -> Tally:
    """Queries go around as keys do in a ring, and the results of each hop go back beside the next one."""
    plan, problem, _, schedule, *_ = choice
    own = next(number for number, hop in enumerate(schedule) if hop.queries == hop.keys == 0)
    first, hops = schedule[: own + 1], schedule[own:]
    tally = Tally(choice)
    queries, results = problem.rows * problem.query_bytes, problem.rows * problem.result_bytes
    # Of the rank with the most, in each hop.
    shares = [1.0] * len(hops)
    if plan.owner is None and problem.rows:
        between, ranks = traveling_queries(problem, plan).between, np.arange(plan.cp_size)
        turns = [hop.queries for hop in hops if isinstance(hop.queries, int)]
        shares = [float(between[ranks, (ranks + turn) % plan.cp_size].max()) / problem.rows for turn in turns]
    over_pages = problem.cache == "paged" and plan.owner is None
    if plan.owner is None:
        _write_own(tally)
    else:
        # A copy of the shard is attended to, and new keys travel with the queries past those who write them.
        tally.move(2 * plan.largest_shard * problem.key_bytes, launches=2)
        queries += problem.rows * problem.key_bytes
    if len(hops) > 1:
        tally.move(2 * queries)
    before = [
        seconds for number, hop in enumerate(first) for seconds in _attend_and_merge(tally, [hop], merges=number > 0, over_pages=over_pages)
    ]
    for number, count in sample(1, len(hops)):
        one, share = Tally(choice), shares[number]
        _write_passing(one)
        launches = _attend_and_merge(one, [hops[number]], merges=False, over_pages=over_pages)
        one.shift(int(share * queries), tally.cover(before if number == 1 else launches))
        _put(one, int(share * results))
        one.shift(int(share * results), 0.0 if number + 1 == len(hops) else tally.cover(launches))
        one.move(3 * results)
        tally.add(one, count)
    return _finished(tally)


def helix(choice: Choice, writes: bool = True) -> Tally:
    """Gather the queries of all heads, attend with them to one's own keys, send each head's results to its rank, merge them."""
    plan, problem = choice.plan, choice.problem
    tally, size = Tally(choice), plan.cp_size
    queries, results = problem.rows * problem.query_bytes, problem.rows * problem.result_bytes
    if writes:
        tally.move(2 * problem.rows * problem.key_bytes // size)
    _copy_pages(tally, int(plan.held_lens.sum(axis=0).max()))
    if size > 1 and problem.rows:
        tally.move(2 * queries // size)
        tally.gather((size - 1) * queries // size)
        tally.move(2 * queries)
    _attend_and_merge(tally, choice.schedule, merges=False, over_pages=problem.cache == "paged")
    if size > 1 and problem.rows:
        _put(tally, results)
        tally.gather_parts((size - 1) * results // size)
        tally.move((size + 2) * results // size)
    return _finished(tally)


def divided_heads(choice: Choice, strategy: DividedHeads) -> Tally:
    """Rows are exchanged for heads within a group, put in order, and attended to with another strategy across groups; results go back."""
    plan, problem, machine = choice.plan, choice.problem, choice.machine
    size, across = strategy.group_size(plan), strategy.across
    assert across is not None  # of all that divide heads
    if size == 1:
        return STEPS[across.name](choice)
    shares, united = shares_of(problem, size), united_layout(plan, size)
    busiest = busiest_share(problem, plan, size)
    transport = choice.transport if size == plan.cp_size else "collectives"
    link, outer = _link_within(machine, transport, size), _link_across(machine, size, plan.cp_size)
    schedule = across.schedule(busiest, united)
    of_groups = choice._replace(
        plan=united,
        problem=busiest,
        schedule=schedule,
        results=num_results(schedule),
        transport=transport,
        link=outer,
        attention=choice.attention.of(united, busiest),
    )
    tally, exchanged = STEPS[across.name](of_groups), Tally(choice._replace(link=link))
    widths = Widths.of(problem, shares)
    for width, into, out_of in ((widths.there, 3, 1), (widths.back, 2, 2)):
        # All of a group's rows: into the message, and out of it.
        exchanged.move(2 * size * problem.rows * width, launches=into)
        exchanged.gather_parts((size - 1) * problem.rows * width)
        exchanged.move(2 * size * problem.rows * width, launches=out_of)
    tally.add(exchanged, 1)
    return tally


def two_levels(choice: Choice, strategy: TwoLevel) -> Tally:
    """Pack, gather across hosts and then within each, put in order, attend."""
    plan, problem, machine, (hop,), *_ = choice
    within = strategy.within
    if not hop.sent.any() or within in (1, plan.cp_size):
        return all_gather(choice)
    view, over_pages, row = View.of(plan), problem.cache == "paged", problem.rows * problem.key_bytes
    tally = Tally(choice._replace(link=_link_within(machine, "collectives", within)))
    first = Tally(choice._replace(link=_link_across(machine, within, plan.cp_size)))
    hosts = plan.cp_size // within
    needed = needed_on_hosts(within, problem, plan)
    if needed is None:
        first.gather((hosts - 1) * row)
        tally.gather((plan.cp_size - hosts) * row)
    else:
        for one, sent, received in (
            (first, needed.sent_across, needed.received_across),
            (tally, needed.sent_within, needed.received_within),
        ):
            # Taken out of what is at hand.
            one.move_rows(int(sent.max()), 1)
            one.gather(max(int(sent.max()), int(received.max())) * problem.key_bytes)
    tally.add(first, 1)
    tally.move_rows(problem.rows, 1)
    if problem.cache == "packed":
        tally.move_rows(int(view.prefix.max()), 1)
    tally.move_rows(plan.num_tokens if over_pages else int(view.new.max()), 1)
    if over_pages:
        _copy_pages(tally, plan.num_tokens + plan.num_prefix_tokens)
    tally.attend(hop, over_pages=over_pages)
    return tally


def _link_within(machine: Machine, transport: str, size: int) -> LinkCosts:
    """Of an all-to-all. Over several hosts each rank sends to each other one by the adapter that is its own."""
    link = machine.link(transport, size)
    assert link is not None  # of such a transport there are no estimates
    return link if size <= machine.ranks_per_host else replace(link, gather=link.shift)


def _link_across(machine: Machine, size: int, cp_size: int) -> LinkCosts:
    """Across groups of so many ranks. A gather comes over the adapters of those ranks of a host that gather the same."""
    link = machine.link("collectives", cp_size)
    assert link is not None  # collectives are always there
    if cp_size <= machine.ranks_per_host:
        return link
    return replace(link, gather=min(link.gather, link.shift * max(1, machine.ranks_per_host // size)))


def steps_of(strategy: Strategy) -> Callable[[Choice], Tally]:
    """What one call of it does."""
    if isinstance(strategy, DividedHeads):
        return partial(divided_heads, strategy=strategy)
    if isinstance(strategy, TwoLevel):
        return partial(two_levels, strategy=strategy)
    return STEPS[strategy.name]


STEPS: dict[str, Callable[[Choice], Tally]] = {
    "all_gather": all_gather,
    "ring": ring,
    "pass_q": pass_q,
    "pass_q_ring": pass_q_ring,
    RESIDENT.name: resident,
    RESIDENT_SHARDS.name: resident_shards,
    HELIX.name: helix,
    RESIDENT_HELIX.name: partial(helix, writes=False),
}


def tally_of(strategy: Strategy, choice: Choice) -> Tally:
    """What a call by a strategy that :func:`steps_of` knows adds up to."""
    tally, problem = steps_of(strategy)(choice), choice.problem
    if problem.sinks and not (choice.backend.native_sinks and choice.results == 1):
        # On the finished result, by eight small kernels. One passes over it, at 0.6 to 0.8 TB/s of an H100 (backends_gpu_merging.csv).
        dtype = problem.dtype if choice.results == 1 else problem.merge_dtype
        tally.move(9 * dtype.itemsize * _outputs(choice), launches=8)
    return tally


def _outputs(choice: Choice) -> int:
    return choice.problem.rows * choice.problem.q_heads * choice.problem.v_head_dim


def _attend_and_merge(tally: Tally, hops: Sequence[Hop], *, merges: bool, over_pages: bool = False) -> list[float]:
    """Launches of hops; with ``merges`` into what there was before. Returns the seconds of each."""
    choice = tally.choice
    launches = tally.attend(*hops, over_pages=over_pages)
    if choice.results > 1 and not choice.backend.propagates_nan:
        # Finding NaN in a column of each result: three small kernels, which overlap.
        tally.move(0, launches=len(hops))
    if merges:
        _merge(tally)
    elif choice.results > 1 and not choice.backend.fp32_out:
        tally.move((choice.problem.dtype.itemsize + choice.problem.merge_dtype.itemsize) * _outputs(choice))
    return launches


def _merge(tally: Tally) -> None:
    """One result more. A kernel that merges it itself hides most of the reading and writing behind its other tiles."""
    choice = tally.choice
    merged = 2 * choice.problem.merge_dtype.itemsize * _outputs(choice)
    if choice.backend.accumulate is None:
        tally.move(choice.problem.dtype.itemsize * _outputs(choice) + merged)
    else:
        tally.move(merged // 4, launches=0)


def _put(tally: Tally, nbytes: int) -> None:
    """Results and their LSE into a message, whose rows are not aligned: at half the speed."""
    tally.move(4 * nbytes, launches=2)


def _finished(tally: Tally) -> Tally:
    """What was merged, in the dtype of q."""
    problem = tally.choice.problem
    if tally.choice.results > 1:
        tally.move((problem.dtype.itemsize + problem.merge_dtype.itemsize) * _outputs(tally.choice))
    return tally


def _write_passing(tally: Tally) -> None:
    """One rank's new keys go into pages that every rank has whole, or as many of them as striped ones hold."""
    plan, problem = tally.choice.plan, tally.choice.problem
    if problem.cache == "paged" and (not plan.sharded or plan.owner is not None):
        tally.move(2 * problem.rows * problem.key_bytes // (1 if plan.owner is None else plan.cp_size))


def _write_own(tally: Tally) -> None:
    """A rank's new keys go into its own pages, of which some kernels are given a copy."""
    plan, problem = tally.choice.plan, tally.choice.problem
    if problem.cache == "paged":
        tally.move(2 * problem.rows * problem.key_bytes)
        _copy_pages(tally, plan.largest_shard)


def _copy_pages(tally: Tally, num_tokens: int) -> None:
    """Keys of so many tokens out of their pages, unless the kernel reads them as they are; and stored ones once more, into q's dtype."""
    problem, kernel = tally.choice.problem, tally.choice.kernel
    is_stored = problem.stored_dtype != problem.dtype
    reads_stored = not is_stored or tally.choice.backend.reads_stored(problem)
    if problem.expands or not (reads_stored and kernel.reads_pages(problem.page_size)):
        tally.move(2 * num_tokens * problem.key_bytes)
    if not reads_stored:
        tally.move(num_tokens * (problem.key_bytes + problem.copied_key_bytes))
