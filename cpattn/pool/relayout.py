"""relayout: moves a cache from one layout to another, between group sizes and owner rules."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from cpattn.call.agreed import validated
from cpattn.call.page_checks import check_lines, check_page_shapes, check_page_table, check_writable
from cpattn.call.page_contents import check_page_contents
from cpattn.call.stored_checks import check_scales
from cpattn.call.stored_contents import check_scales_of_heads
from cpattn.device_tables import DeviceTables, IntArray
from cpattn.errors import GroupError, PageTableError, PlanError, PrefixError, TensorMismatchError
from cpattn.exchange.message import KVFormat, Message, message_buffer
from cpattn.exchange.page_rows import read_rows, write_rows
from cpattn.graphs import leaves_graph
from cpattn.kv_cache import PagedKV
from cpattn.metadata.cp_metadata import CPMetadata
from cpattn.metadata.layout import Layout
from cpattn.metadata.plan import Plan
from cpattn.metadata.plan import plan as plan_of
from cpattn.metadata.routes import Places, Round, routes
from cpattn.transports.groups import Group, as_transport
from cpattn.transports.in_flight import InFlight
from cpattn.transports.process_group import ProcessGroupTransport
from cpattn.transports.transfer import Transfer
from cpattn.transports.transport import Transport

# Of the message that a rank sends in an exchange at most, and of that which it receives, whatever the context. Most are smaller: one
# has that size where all its tokens go from one rank to one other.
_ROUND_BYTES = 256 * 2**20


@leaves_graph
def relayout(
    cache: PagedKV | Sequence[PagedKV] | None,
    plan: Plan,
    to_cache: PagedKV | Sequence[PagedKV] | None,
    to_plan: Plan,
    *,
    group: Group = None,
    check: bool = False,
) -> None:
    """Copies all cached tokens from pages of one layout into pages of another: a collective call over the larger group.

    >>> import cpattn, torch
    >>> old, new = (cpattn.plan([(10, 1)], 1, owner=cpattn.Striped(n)) for n in (1, 4))
    >>> pages = torch.arange(16.0).view(4, 4, 1, 1).repeat(1, 1, 2, 8)
    >>> cache = cpattn.PagedKV(pages, pages.clone(), torch.tensor([[2, 0, 1]]))
    >>> moved = cpattn.PagedKV(torch.zeros(2, 8, 2, 8), torch.zeros(2, 8, 2, 8), torch.tensor([[1, 0]]))
    >>> cpattn.relayout(cache, old, moved, new)
    >>> moved.k_pages[1, :, 0, 0].tolist()  # the tokens of pages 2 and 0
    [8.0, 9.0, 10.0, 11.0, 0.0, 1.0, 2.0, 3.0]

    What moves are the prefixes, each request's by itself: pages that requests share have a copy for each then. An engine that grows
    or shrinks its group, or changes its owner rule or page size, calls it between two steps, and goes on with ``to_plan``. From a
    replicated cache each rank gives what it has.

    Args:
        cache: this rank's pages as ``plan`` has them: one layer's, or all layers' in a sequence. None on ranks beyond its
            cp_size.
        plan: whose prefixes are in the cache: replicated, with an ``owner``, or with ``prefix_ranks``. What is new in it does not
            count: of a :class:`KVPool` pass ``pool.plan`` of the requests with 0 new tokens each.
        to_cache: pages for ``to_plan``, of the same heads, head_dim, dtype, scales and device, for all cached tokens. They must be
            others than those in ``cache``. None on ranks beyond its cp_size.
        to_plan: of the same prefixes, in the same order.
        group: of as many ranks as the larger of both plans has; its first ranks are those of the smaller one.
        check: compare plans and caches of all ranks first, in one small collective that waits for the device; and look at page tables
            on a GPU, as it is done on a CPU anyway.

    Raises:
        PlanError: other prefixes, or ``prefix_shards``, which do not say which tokens a rank has: ``prefix_ranks`` do.
        PrefixError, PageTableError, TensorMismatchError, GroupError: in each case before anything is sent; GroupError also where a
            transfer fails. What a page table or scales hold is refused in the middle of the call where there is no ``check``, by the rank
            that has them alone.

    Of a rank that fails in the middle of the call, K arrives as NaN and V as 0.
    """
    # What is wrong on this rank alone is found where the others hear of it.
    transport = as_transport(group, max((given.cp_size for given in (plan, to_plan) if isinstance(given, Layout)), default=1))

    def validate() -> _Moved:
        old, new = _prefixes(plan, "plan"), _prefixes(to_plan, "to_plan")
        if old.batch != new.batch:
            raise PlanError(
                f"plan and to_plan speak of other prefixes: {old.prefix_lens.tolist()} and {new.prefix_lens.tolist()} tokens; "
                "pass plans of the same requests, in the same order"
            )
        sources, targets = _as_list(cache, "cache"), _as_list(to_cache, "to_cache")
        if not sources and not targets:
            raise PrefixError(f"cache and to_cache are both None on rank {transport.rank}; pass what this rank has in either layout")
        moved = _Moved.of(sources, targets, old, new, transport)
        if check:
            moved.look(transport.rank)
        return moved

    with InFlight(transport, _device_of([cache, to_cache], transport)) as in_flight:
        # Both plans are among the arguments.
        moved = validated(validate, _Moved.describe, None, in_flight, check, None)
        messages: list[Message] = []

        def make() -> list[Transfer]:
            messages[:] = moved.messages(transport)
            return moved.transfers(transport, *messages)

        in_flight.expect(make)
        if moved.kv.device.type == "cpu":
            # Now that the others do not wait for a rank that refuses what it alone can see.
            moved.look(transport.rank)
        moved.run(in_flight, *messages)


class _Moved(NamedTuple):
    """What is moved, layer after layer.

    Attributes:
        plans: the layout that they are in, and that into which they go.
        sources, targets: pages of each layer; empty where this rank has none.
        routes: the exchanges of one layer; rows: that each rank's message has in them for each other rank.
    """

    kv: KVFormat
    plans: tuple[Plan, Plan]
    layers: int
    sources: list[PagedKV]
    targets: list[PagedKV]
    rows: int
    routes: list[Round]

    @classmethod
    def of(cls, sources: list[PagedKV], targets: list[PagedKV], old: Plan, new: Plan, transport: Transport) -> _Moved:
        size = max(old.cp_size, new.cp_size)
        if transport.size != size:
            raise GroupError(
                f"the group has {transport.size} ranks, but the plans have {old.cp_size} and {new.cp_size}; pass the larger group"
            )
        for name, given, of in (("cache", sources, old), ("to_cache", targets, new)):
            if (transport.rank < of.cp_size) != bool(given):
                has, fix = ("given", "pass None here") if given else ("None", "pass this rank's pages")
                raise PrefixError(f"{name} is {has} on rank {transport.rank}, but its plan has cp_size={of.cp_size}; {fix}")
        if sources and targets and len(sources) != len(targets):
            raise PrefixError(f"cache has {len(sources)} layers, to_cache {len(targets)}; pass as many of each")
        _check_form(sources, old, transport.rank, "cache")
        _check_form(targets, new, transport.rank, "to_cache")
        like = (sources or targets)[0]
        for pages in (*sources, *targets):
            _check_like(pages, like)
        kv = KVFormat.of_pages(like)
        # A message has as many rows for each rank as the rank that gets the most, and that may get all of them.
        tokens = max(1, _ROUND_BYTES // (kv.heads * kv.width * kv.wire_dtype.itemsize * size))
        layers = max(len(sources), len(targets))
        return cls(kv, (old, new), layers, sources, targets, *routes(old, new, transport.rank, size, tokens))

    def look(self, rank: int) -> None:
        """What is refused of the numbers in tables and scales, of which each rank has its own. It means reading them."""
        old, new = self.plans
        for layers, of, written in ((self.sources, old, False), (self.targets, new, True)):
            if not layers:
                continue  # a rank beyond those of the plan
            meta = _metadata(of, rank, self.kv.device, written=written)
            for pages in layers:
                check_scales_of_heads(pages)
                check_page_contents(pages, meta, written=written)
        for source, target in zip(self.sources, self.targets, strict=False):
            _check_apart(source, target, old, new, rank)
            _check_same_scales(source, target)

    def describe(self) -> str:
        """What must be the same on every rank."""
        kv, plans = self.kv, " to ".join(plan.fingerprint for plan in self.plans)
        stored = f"{kv.dtype} with scales of {kv.scales or 'nothing'}"
        heads, exchanges = f"{kv.heads} heads of {kv.head_dim}/{kv.v_head_dim}", f"{len(self.routes)} exchanges of {self.rows} rows"
        return f"relayout from {plans}, {self.layers} layers of {heads}, {stored}, {exchanges}"

    def messages(self, transport: Transport) -> list[Message]:
        """Memory for what is sent and received in an exchange."""
        rows = transport.size * self.rows
        return [message_buffer(transport.arena, f"relayout {end}", self.kv, rows) for end in ("sent", "received")]

    def transfers(self, transport: Transport, sent: Message, received: Message) -> list[Transfer]:
        """All exchanges, in order."""
        if transport.size == 1:
            return []
        exchange = transport.prepare_all_to_all(received.whole, sent.whole)
        exchange = exchange._replace(fill_missing=partial(self.kv.fill_missing_, sent.whole))
        return [exchange] * (len(self.routes) * self.layers)

    def run(self, in_flight: InFlight, sent: Message, received: Message) -> None:
        """Moves all of it."""
        kv, device = self.kv, self.kv.device
        places = [[_on_device(ends, device) for ends in route] for route in self.routes]
        is_alone = in_flight.transport.size == 1
        arrived = sent if is_alone else received
        for layer in range(self.layers):
            for of, to in places:
                if self.sources:
                    read_rows(kv, self.sources[layer], of, *sent.parts)
                if not is_alone:
                    in_flight.start().wait()
                if self.targets:
                    write_rows(kv, self.targets[layer], to, *arrived.parts)


def _prefixes(given: Any, name: str) -> Plan:
    """A plan of the same prefixes with nothing new."""
    if not isinstance(given, Layout):
        raise PlanError(f"{name} is a {type(given).__name__}; pass a Plan, which cpattn.plan makes of a batch")
    if not given.knows_positions:
        raise PlanError(
            f"{name} has prefix_shards, which say how many tokens each rank has, but not which; pass prefix_ranks in their place"
        )
    batch = [(prefix, 0) for prefix in given.prefix_lens.tolist()]
    return plan_of(batch, given.cp_size, owner=given.owner, prefix_ranks=given.prefix_ranks)


def _as_new(of: Plan) -> Plan:
    """The step that computes all of these prefixes, and leaves each token where it lies in them."""
    batch = [(0, prefix) for prefix, _ in of.batch]
    if of.prefix_ranks is None:
        return plan_of(batch, of.cp_size, owner=of.owner)
    ranks = of.prefix_ranks
    return plan_of(batch, of.cp_size, partition=lambda batch, cp_size: ranks.runs(), prefix_shards=[[0] * of.cp_size] * len(batch))


def _as_list(given: Any, name: str) -> list[PagedKV]:
    """The pages of each layer."""
    layers: list[Any] = [given]
    if given is None or isinstance(given, Sequence):
        layers = list(given or ())
    if not all(isinstance(layer, PagedKV) for layer in layers):
        raise PrefixError(f"{name} is a {type(given).__name__}; pass a PagedKV(k_pages, v_pages, page_table), or one for each layer")
    return layers


def _device_of(given: list[Any], transport: Transport) -> torch.device:
    """Of the pages that this rank has; where it was given none, of those that its group is for, to say so to the others."""
    layers = [layer for one in given for layer in (one if isinstance(one, Sequence) else [one])]
    for pages in layers:
        if isinstance(pages, PagedKV) and isinstance(pages.k_pages, Tensor):
            return pages.k_pages.device
    is_of_gpus = isinstance(transport, ProcessGroupTransport) and dist.get_backend(transport.group) != "gloo"
    return torch.device("cuda", torch.cuda.current_device()) if is_of_gpus and torch.cuda.is_available() else torch.device("cpu")


def _metadata(of: Plan, rank: int, device: torch.device, *, written: bool) -> CPMetadata:
    """A rank's; where prefixes are written, as of tokens that are, so that each needs a slot of its own."""
    return CPMetadata(_as_new(of) if written else of, rank, device)


def _check_form(layers: list[PagedKV], of: Plan, rank: int, name: str) -> None:
    """The form of pages, scales and table, and what a KVPool says of it."""
    if not layers:
        return
    written = name == "to_cache"
    meta = _metadata(of, rank, layers[0].k_pages.device, written=written)
    for pages in layers:
        check_page_shapes(pages)
        check_scales(pages)
        check_lines(pages, meta)
        _check_all_are_prefixes(pages, of, name)
        check_page_table(pages.page_table, pages.page_size, meta)
        if written:
            check_writable(pages)


def _check_all_are_prefixes(pages: PagedKV, of: Plan, name: str) -> None:
    """That a KVPool's tokens are prefixes of the plan: those of the plan that brought them are its new ones, and would stay behind."""
    if pages.lines is None:
        return
    held = pages.lines.tokens[: len(of.batch)]
    prefixes = of.held_lens if of.sharded else of.prefix_lens[:, None]
    if (held > prefixes).any():
        line, rank = (int(place) for place in np.argwhere(held > prefixes)[0])
        where, plan = f" on rank {rank}" if of.sharded else "", "to_plan" if name == "to_cache" else "plan"
        raise PrefixError(
            f"line {line} of {name}'s page_table is of a KVPool that has {int(held[line, rank])} tokens of the request{where}, but "
            f"{plan}'s prefix has {int(prefixes[line, rank])} there, and new tokens are not moved; pass what pool.plan makes of the "
            "requests with 0 new tokens"
        )


def _check_like(pages: PagedKV, like: PagedKV) -> None:
    for name, x, y in (("k_pages", pages.k_pages, like.k_pages), ("v_pages", pages.v_pages, like.v_pages)):
        if (x is None) != (y is None):
            raise PrefixError(f"some {name} are None and others are not; both caches have V, or in both it is a part of K")
        if x is not None and y is not None and (x.shape[2:] != y.shape[2:] or x.dtype != y.dtype or x.device != y.device):
            raise TensorMismatchError(
                f"{name} are {tuple(x.shape)} {x.dtype} on {x.device} in one place, {tuple(y.shape)} {y.dtype} on {y.device} in another; "
                "heads, head_dim, dtype and device must be the same in both caches and all layers"
            )

    if pages.scales != like.scales:
        raise TensorMismatchError(
            f"a scale belongs to a {pages.scales} in one place, to a {like.scales} in another; it must be the same in both caches and all "
            "layers, as numbers are moved as they are"
        )


def _check_same_scales(source: PagedKV, target: PagedKV) -> None:
    """That numbers mean in one place what they mean in the other."""
    if source.scales != "head":
        return
    heads = source.k_pages.shape[2]
    for name, x, y in (("k_scale", source.k_scale, target.k_scale), ("v_scale", source.v_scale, target.v_scale)):
        if x is not None and y is not None and not torch.equal(x.reshape(-1).expand(heads), y.reshape(-1).expand(heads)):
            raise TensorMismatchError(
                f"{name} is {x.tolist()} in cache and {y.tolist()} in to_cache; numbers are moved as they are, so that both need the same"
            )


def _check_apart(source: PagedKV, target: PagedKV, old: Plan, new: Plan, rank: int) -> None:
    """That one pool's pages, where both are of it, are not used by both."""
    if source.k_pages.data_ptr() != target.k_pages.data_ptr():
        return
    used = [_used(cache, of.held_lens[:, rank]) for cache, of in ((source, old), (target, new))]
    both = used[0] & used[1]
    if both:
        raise PageTableError(f"page {min(both)} is in use in both cache and to_cache, and would be overwritten; pass other pages")


def _used(cache: PagedKV, held: IntArray) -> set[int]:
    counts = (-(-held // cache.page_size)).tolist()
    return {page for line, count in zip(cache.page_table.tolist(), counts, strict=False) for page in line[:count]}


def _on_device(places: Places, device: torch.device) -> tuple[Tensor, Tensor]:
    tables = DeviceTables(places._asdict(), device)
    return tables["request"], tables["number"]
