"""Which ways to make a call may be the fastest, by bounds of what they take: most others are told without an estimate.

It holds for all-gathers, rings, and ranks that divide heads, of what every rank can see whole, without a window. Other ways are all left.
Bounds have a margin, so that what is taken hangs on no last bit of them, and is the same on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from cpattn.attention.registry import BACKENDS
from cpattn.costs.bounds import Bounds
from cpattn.costs.hop_spans import MOST_OFFSETS
from cpattn.costs.launches import Given, Launches
from cpattn.costs.order_or_pages import attends_over_pages
from cpattn.costs.steps.heads import exchange_of_heads
from cpattn.costs.steps.links_of_groups import link_within
from cpattn.costs.steps.tally import Choice, Tally
from cpattn.costs.ways import Call, Way
from cpattn.exchange.all_gather import ALL_GATHER
from cpattn.exchange.divided_heads import busiest_share
from cpattn.exchange.ring import RING
from cpattn.exchange.ring_keys import ring_keys
from cpattn.exchange.traveling_keys import traveling_keys
from cpattn.exchange.ulysses import ULYSSES
from cpattn.metadata.united import united_layout
from cpattn.problem import Problem

# Seconds: estimates are compared to a ns.
_MARGIN = 2e-9
_BOUNDED = {ALL_GATHER.name, RING.name, ULYSSES.name}


def contenders(call: Call, ways: Sequence[Way]) -> list[Way]:
    """Of two ways or more those, one at least, that may be estimated to be the fastest; in their order."""
    plan, problem = call.plan, call.problem
    names = {way.strategy.name for way in ways}
    if plan.sharded or problem.window is not None or problem.overlap > 1 or not {ALL_GATHER.name} <= names <= _BOUNDED:
        return list(ways)
    # A longer attention hides more of what it need not wait for, up to all of that.
    if call.link.hides_gather and traveling_keys(problem, plan).rest:
        return list(ways)
    floors = _Floors(call, ways)
    likely, most = floors.likely()
    # What takes longer to work out comes later.
    others = [number for number in range(len(ways)) if number != likely and floors.least(number) <= most]
    others = [number for number in others if ways[number].strategy is not ALL_GATHER or floors.closer(number) <= most]
    if others and floors.has_rounds(likely):
        most = min(most, floors.most_in_rounds(likely))
        others = [number for number in others if floors.least(number) <= most]
    if not others:
        return [ways[likely]]
    at_once = [number for number in others if ways[number].strategy is not RING and floors.closer(number) <= most]
    most_of_others = min([floors.most(number) for number in at_once], default=most)
    at_once.append(likely)
    if most_of_others < most:
        most = most_of_others
        at_once = [number for number in at_once if floors.closer(number) <= most]
    rings = [number for number in others if ways[number].strategy is RING and floors.least(number) <= most]
    rings = [number for number in rings if floors.with_copies(number) <= most]
    rings = [number for number in rings if floors.by_hops(number) <= most]
    # A ring is compared with its all-gather.
    of_rings = {ways[number].backend.name for number in rings}
    gathers = {number for number, way in enumerate(ways) if way.strategy is ALL_GATHER and way.backend.name in of_rings}
    return [ways[number] for number in sorted({*at_once, *rings, *gathers})]


class _Floors:
    """Seconds that ways take at least, each by its number."""

    def __init__(self, call: Call, ways: Sequence[Way]) -> None:
        self._call, self._ways = call, ways
        self._kernels = [call.kernels[way.backend.name] for way in ways]
        self._bounds = self._bounds_over(call.launches, call.problem)
        # Those whose constants stand for them.
        self._backends = [kernel.backend for kernel in self._kernels]
        self._least: dict[int, float] = {}
        self._closer: dict[int, float] = {}

    def least(self, number: int) -> float:
        """A floor of one; worked out once."""
        if number not in self._least:
            divides_heads, backend = self._ways[number].strategy is ULYSSES, self._backends[number]
            self._least[number] = self._beside_heads(number) if divides_heads else self._of(number, self._bounds.at_least(backend))
        return self._least[number]

    def likely(self) -> tuple[int, float]:
        """The all-gather that is likely to be the fastest, and what it takes at most."""
        gathers = [number for number, way in enumerate(self._ways) if way.strategy is ALL_GATHER]
        number = gathers[0] if len(gathers) == 1 else min(gathers, key=self.least)
        return number, self.most(number)

    def most(self, number: int) -> float:
        """What it takes at most, of one launch."""
        return self._of(number, self._bounds_of(number).at_most(self._backends[number])) + _MARGIN

    def has_rounds(self, number: int) -> bool:
        """Whether it counts when its last tiles end."""
        return self._bounds_of(number).has_rounds(self._backends[number])

    def most_in_rounds(self, number: int) -> float:
        """The same, by that."""
        return self._of(number, self._bounds_of(number).at_most_in_rounds(self._backends[number])) + _MARGIN

    def closer(self, number: int) -> float:
        """A floor of what has one launch, worked out from more."""
        if number not in self._closer:
            self._closer[number] = self._of(number, self._bounds_of(number).at_least_by_tiles(self._backends[number]))
        return self._closer[number]

    def with_copies(self, number: int) -> float:
        """A floor of a ring, with what it does beside its launches."""
        # In pages a ring has its prefixes alone, which a kernel may read more slowly there.
        in_pages, backend = self._call.problem.cache == "paged", self._backends[number]
        return self._beside_launches(number, self._bounds.at_least(backend) if in_pages else self._bounds.at_least_by_tiles(backend))

    def by_hops(self, number: int) -> float:
        """The same, by what each hop has at least."""
        # Of a longer ring estimates look at some hops alone, which others may be less than.
        is_short = self._call.plan.cp_size <= MOST_OFFSETS + 1
        return self._beside_launches(number, self._bounds.ring_at_least(self._backends[number])) if is_short else 0.0

    def _beside_launches(self, number: int, compute: float) -> float:
        way, kernel = self._ways[number], self._kernels[number]
        beside = self._call.beside_hops(way)
        return self._call.seconds(way, compute + beside.moves + beside.exposed, beside.host + len(way.schedule) * kernel.host)

    def _of(self, number: int, compute: float) -> float:
        """With launches that take so many seconds: the more they take, the more it all does."""
        way, kernel, call = self._ways[number], self._kernels[number], self._call
        if way.strategy is not RING:
            tally = call.tally(way, kernel, Given(compute))
            return call.seconds(way, tally.seconds, tally.host)
        exposed, host = self._messages
        return call.seconds(way, compute + exposed, host + len(way.schedule) * kernel.host)

    @cached_property
    def _messages(self) -> tuple[float, float]:
        """Of a ring, of the device and the host; hidden as far as they can be."""
        link, others, travels = self._call.link, self._call.plan.cp_size - 1, ring_keys(self._call.problem, self._call.plan)
        sent = (travels.sent.max(axis=1) * self._call.problem.key_bytes).tolist() if self._call.problem.rows else []
        if len(sent) > MOST_OFFSETS:
            # Estimates look at some of them.
            sent = [min(sent)] * len(sent)
        seconds = [link.shift_seconds(nbytes, others) for nbytes in sent if nbytes]
        exposed = sum(one - link.hides_shift * max(0.0, one - link.latency_of_shift) for one in seconds)
        return exposed, len(seconds) * link.host_shift

    def _beside_heads(self, number: int) -> float:
        """Of ranks that divide heads: the exchange of rows, and the launch over whole requests."""
        call, kernel, exchange = self._call, self._kernels[number], self._exchange
        compute = self._bounds.at_least_by_heads(self._backends[number])
        return call.seconds(self._ways[number], compute + exchange.moves + exchange.exposed, exchange.host + kernel.host)

    @cached_property
    def _exchange(self) -> Tally:
        call, size = self._call, self._call.plan.cp_size
        link, kernel = link_within(call.machine, call.transport, size), self._kernels[0]
        choice = Choice(
            call.plan, call.problem, call.machine, (), call.transport, link, BACKENDS[kernel.backend], kernel, Given(0.0), results=1
        )
        return exchange_of_heads(choice, size)

    def _bounds_of(self, number: int) -> Bounds:
        return self._of_heads if self._ways[number].strategy is ULYSSES else self._bounds

    @cached_property
    def _of_heads(self) -> Bounds:
        """Of whole requests, with the heads of the busiest rank."""
        call, size = self._call, self._call.plan.cp_size
        busiest = busiest_share(call.problem, call.plan, size)
        return self._bounds_over(call.launches.of(united_layout(call.plan, size), busiest), busiest)

    def _bounds_over(self, launches: Launches, problem: Problem) -> Bounds:
        call, backends = self._call, {way.backend.name: way.backend for way in self._ways}
        in_pages = {
            kernel.backend: attends_over_pages(problem, launches.plan, call.machine, kernel, backends[name])
            for name, kernel in call.kernels.items()
        }
        return Bounds(launches, in_pages)
