"""relayout: moves a cache from one layout to another, between group sizes and owner rules."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cpattn.call.agreed import validated
from cpattn.call.page_checks import check_page_shapes, check_page_table, check_writable
from cpattn.call.page_contents import check_page_contents
from cpattn.device_tables import DeviceTables, IntArray
from cpattn.errors import GroupError, PageTableError, PlanError, PrefixError, TensorMismatchError
from cpattn.exchange.message import KVFormat, Message, message_buffer
from cpattn.graphs import leaves_graph
from cpattn.kv_cache import PagedKV
from cpattn.metadata.cp_metadata import CPMetadata
from cpattn.metadata.layout import Layout
from cpattn.metadata.plan import Plan
from cpattn.metadata.plan import plan as plan_of
from cpattn.metadata.routes import Places, Round, routes
from cpattn.moves.moves import moves_for
from cpattn.transports.groups import Group, as_transport
from cpattn.transports.in_flight import InFlight
from cpattn.transports.transfer import Transfer
from cpattn.transports.transport import Transport

# Of the tokens that one exchange moves, over all ranks: what messages hold does not grow with the context.
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

    What moves are the prefixes. An engine that grows or shrinks its group, or changes its owner rule or page size, calls it
    between two steps, and goes on with ``to_plan``. From a replicated cache each rank gives what it has.

    Args:
        cache: this rank's pages as ``plan`` has them: one layer's, or all layers' in a sequence. None on ranks beyond its
            cp_size.
        plan: whose prefixes are in the cache: replicated, or with an ``owner``. What is new in it does not count.
        to_cache: pages for ``to_plan``, of the same heads, head_dim, dtype and device, for all cached tokens. They must be
            others than those in ``cache``. None on ranks beyond its cp_size.
        to_plan: of the same prefixes, in the same order.
        group: of as many ranks as the larger of both plans has; its first ranks are those of the smaller one.
        check: compare plans and caches of all ranks first, in one small collective that waits for the device.

    Raises:
        PlanError: other prefixes, or ``prefix_shards``, which do not say which tokens a rank has.
        PrefixError, PageTableError, TensorMismatchError, GroupError: in each case before anything is sent; GroupError also where a
            transfer fails.

    Of a rank that fails in the middle of the call, K arrives as NaN and V as 0.
    """
    old, new = _prefixes(plan, "plan"), _prefixes(to_plan, "to_plan")
    if old.batch != new.batch:
        raise PlanError(
            f"plan and to_plan speak of other prefixes: {old.prefix_lens.tolist()} and {new.prefix_lens.tolist()} tokens; "
            "pass plans of the same requests, in the same order"
        )
    transport = as_transport(group, max(old.cp_size, new.cp_size))
    given = _as_list(cache, "cache"), _as_list(to_cache, "to_cache")
    if not any(given):
        raise PrefixError(f"cache and to_cache are both None on rank {transport.rank}; pass what this rank has in either layout")
    device = next(layer for layers in given for layer in layers).k_pages.device
    meta = new.metadata(min(transport.rank, new.cp_size - 1), device)

    def validate() -> _Moved:
        return _Moved.of(*given, old, new, transport)

    with InFlight(transport, device) as in_flight:
        moved = validated(validate, _Moved.describe, meta, in_flight, check, None)
        messages: list[Message] = []

        def make() -> list[Transfer]:
            messages[:] = moved.messages(transport)
            return moved.transfers(transport, *messages)

        in_flight.expect(make)
        moved.run(in_flight, *messages)


class _Moved(NamedTuple):
    """What is moved, layer after layer.

    Attributes:
        plan: the fingerprint of the layout that they are in.
        sources, targets: pages of each layer; empty where this rank has none.
        routes: the exchanges of one layer; rows: that each rank's message has in them for each other rank.
    """

    kv: KVFormat
    plan: str
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
        _check(sources, old, transport.rank, written=False)
        _check(targets, new, transport.rank, written=True)
        like = (sources or targets)[0]
        for pages in (*sources, *targets):
            _check_like(pages, like)
        for source, target in zip(sources, targets, strict=False):
            _check_apart(source, target, old, new, transport.rank)
        k, v = like.k_pages, like.v_pages
        kv = KVFormat(k.shape[2], k.shape[3], k.shape[3] if v is None else v.shape[3], v is None, k.dtype, k.device)
        tokens = max(1, _ROUND_BYTES // (kv.heads * kv.width * kv.dtype.itemsize))
        layers = max(len(sources), len(targets))
        return cls(kv, old.fingerprint, layers, sources, targets, *routes(old, new, transport.rank, size, tokens))

    def describe(self) -> str:
        """What must be the same on every rank."""
        kv = self.kv
        exchanges = f"{len(self.routes)} exchanges of {self.rows} rows"
        return (
            f"relayout from {self.plan}, {self.layers} layers of {kv.heads} heads of {kv.head_dim}/{kv.v_head_dim}, {kv.dtype}, {exchanges}"
        )

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
        moves, device = moves_for(self.kv.device), self.kv.device
        places = [[_on_device(ends, device) for ends in route] for route in self.routes]
        is_alone = in_flight.transport.size == 1
        arrived = sent if is_alone else received
        for layer in range(self.layers):
            for of, to in places:
                if self.sources:
                    pages = self.sources[layer]
                    moves.read_pages(pages.k_pages, pages.v_pages, pages.page_table, *of, *sent.parts)
                if not is_alone:
                    in_flight.start().wait()
                if self.targets:
                    pages = self.targets[layer]
                    moves.write_pages(pages.k_pages, pages.v_pages, pages.page_table, *to, *arrived.parts)


def _prefixes(given: Any, name: str) -> Plan:
    """A plan of the same prefixes with nothing new."""
    if not isinstance(given, Layout):
        raise PlanError(f"{name} is a {type(given).__name__}; pass a Plan, which cpattn.plan makes of a batch")
    if given.prefix_shards is not None:
        raise PlanError(
            f"{name} has prefix_shards, which say how many tokens each rank has, but not which; relayout moves replicated caches, and "
            "those with an owner"
        )
    return plan_of([(prefix, 0) for prefix in given.prefix_lens.tolist()], given.cp_size, owner=given.owner)


def _as_list(given: Any, name: str) -> list[PagedKV]:
    """The pages of each layer."""
    layers: list[Any] = [given]
    if given is None or isinstance(given, Sequence):
        layers = list(given or ())
    if not all(isinstance(layer, PagedKV) for layer in layers):
        raise PrefixError(f"{name} is a {type(given).__name__}; pass a PagedKV(k_pages, v_pages, page_table), or one for each layer")
    return layers


def _check(layers: list[PagedKV], of: Plan, rank: int, *, written: bool) -> None:
    """The form of pages and table, and, on a CPU, what the table holds."""
    if not layers:
        return
    # As tokens that are written, so that each needs a slot of its own.
    batch = [(0, prefix) if written else (prefix, 0) for prefix, _ in of.batch]
    meta = CPMetadata(plan_of(batch, of.cp_size, owner=of.owner), rank, layers[0].k_pages.device)
    for pages in layers:
        check_page_shapes(pages)
        check_page_table(pages.page_table, pages.page_size, meta)
        if written:
            check_writable(pages)
        if pages.page_table.device.type == "cpu":
            check_page_contents(pages, meta, written=written)


def _check_like(pages: PagedKV, like: PagedKV) -> None:
    for name, x, y in (("k_pages", pages.k_pages, like.k_pages), ("v_pages", pages.v_pages, like.v_pages)):
        if (x is None) != (y is None):
            raise PrefixError(f"some {name} are None and others are not; both caches have V, or in both it is a part of K")
        if x is not None and y is not None and (x.shape[2:] != y.shape[2:] or x.dtype != y.dtype or x.device != y.device):
            raise TensorMismatchError(
                f"{name} are {tuple(x.shape)} {x.dtype} on {x.device} in one place, {tuple(y.shape)} {y.dtype} on {y.device} in another; "
                "heads, head_dim, dtype and device must be the same in both caches and all layers"
            )


def _check_apart(source: PagedKV, target: PagedKV, old: Plan, new: Plan, rank: int) -> None:
    """That one pool's pages, where both are of it, are not used by both; seen on a CPU alone."""
    if source.k_pages.data_ptr() != target.k_pages.data_ptr() or source.page_table.device.type != "cpu":
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
