"""What a kind of machine can do, in a few constants, each with its source.

All are for bf16 or fp16. ``tests/costs/test_measured.py`` recomputes measured tables with them.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from math import inf
from typing import Any

import torch

from cpattn.errors import OptionError, UnknownNameError, shown
from cpattn.memo import Memo
from cpattn.stored import ScaleKind, is_fp8

TRANSPORTS = ("peer_memory", "collectives")
# Of a machine: by the heads of a call and the backends compared, of which a model has few.
_MOST_REMEMBERED = 64
US = 1e-6
GB = 1e9


def _check(costs: Any, more_than_0: tuple[str, ...], at_least_0: tuple[str, ...]) -> None:
    """Raises OptionError unless these attributes are finite numbers of that size."""
    for name in (*more_than_0, *at_least_0):
        value = getattr(costs, name)
        positive = name in more_than_0
        if not isinstance(value, (int, float)) or not (0 < value < inf if positive else 0 <= value < inf):
            rule = "more than 0" if positive else "at least 0"
            raise OptionError(f"{type(costs).__name__}.{name}={shown(value)}; it must be a finite number, {rule}")


@dataclass(frozen=True)
class LinkCosts:
    """What carries messages between ranks. Sizes are in bytes, times in seconds.

    >>> import cpattn
    >>> nvlink = cpattn.MACHINES["h200-nvlink"].collectives
    >>> 2e-4 < nvlink.gather_seconds(64 * 2**20) < 4e-4
    True

    Attributes:
        latency: seconds of a message of no bytes, its launch included; of one from a rank to another ``shift_latency``, and of keys that
            come late ``late_latency``, if these are given.
        gather: bytes a second that a rank receives in an all-gather.
        shift: bytes a second that a rank receives from one other.
        hides_gather, hides_shift: of what travels beside attention, the part that costs nothing. Where kernels of the call itself fetch a
            gather, in their turn, it is 0.
        by_kernels: whether kernels carry it, for which multiprocessors have to be free.
        host_gather, host_shift: seconds that the host takes to start one.
        measured_ranks: of how many ranks it was measured; 0 if it is stated, by data sheets.
        hides_late: as ``hides_gather``, of keys that come beside an attention that waits for each of them: the kernel that brings them
            takes multiprocessors meanwhile, and the first tiles wait.
        from_one: bytes a second that all others together receive from one rank whose memory they read; None where it is no limit.
        shift_of_many: as ``shift``, of a ring of more than two ranks; None where it is the same.
        shift_latency, late_latency: see ``latency``.
    """

    latency: float
    gather: float
    shift: float
    hides_gather: float
    hides_shift: float
    by_kernels: bool
    host_gather: float
    host_shift: float
    measured_ranks: int = 0
    hides_late: float = 0.0
    from_one: float | None = None
    shift_of_many: float | None = None
    shift_latency: float | None = None
    late_latency: float | None = None

    def __post_init__(self) -> None:
        rates, latencies = (
            tuple(name for name in names if getattr(self, name) is not None)
            for names in (("from_one", "shift_of_many"), ("shift_latency", "late_latency"))
        )
        at_least_0 = ("latency", "hides_gather", "hides_shift", "hides_late", "host_gather", "host_shift", "measured_ranks", *latencies)
        _check(self, ("gather", "shift", *rates), at_least_0)
        for name in ("hides_gather", "hides_shift", "hides_late"):
            if getattr(self, name) > 1:
                raise OptionError(f"LinkCosts.{name}={shown(getattr(self, name))}; it is a part, of 1 at most")

    def gather_seconds(self, nbytes: int, others: int = 1, crowded: float = 0.0) -> float:
        """Of an all-gather in which a rank receives that many bytes, of which it reads a part ``crowded`` while all ``others`` read the
        same rank's memory."""
        if not nbytes:
            return 0.0
        slowed = 0.0 if self.from_one is None else crowded * max(0.0, others / self.from_one - 1 / self.gather)
        return self.latency + nbytes * (1 / self.gather + slowed)

    def shift_seconds(self, nbytes: int, others: int = 1) -> float:
        """Of a message of that many bytes from one rank to another, of so many others."""
        shift = self.shift if others == 1 or self.shift_of_many is None else self.shift_of_many
        return self.latency_of_shift + nbytes / shift if nbytes else 0.0

    @property
    def latency_of_shift(self) -> float:
        """Of a message from one rank to another."""
        return self.latency if self.shift_latency is None else self.shift_latency

    @property
    def latency_of_late(self) -> float:
        """Of keys that come late."""
        return self.latency if self.late_latency is None else self.late_latency


@dataclass(frozen=True)
class KernelCosts:
    """What an attention backend does on a machine. Times are in seconds.

    >>> import cpattn
    >>> [kernel.backend for kernel in cpattn.MACHINES["h100-nvlink"].kernels]
    ['triton', 'flash_attn4', 'flash_attn3']

    Attributes:
        backend: its name.
        flops: of tiles that are full and many, a second, while the machine goes on without a rest.
        overhead: seconds of a launch beside its tiles: it starts, fills its pipelines, and ends.
        tile: what a tile costs beside its key blocks, in key blocks: loading q and the first keys, writing the result.
        paged: by how much it is slower over pages that it reads as they are, where computing takes the time.
        copies_pages: sizes of pages that it is given a packed copy of, in tokens; None for all.
        read: bytes of K and V a second where reading them takes the time, as in decoding.
        stays: whether its programs stay on the multiprocessors until the launch ends.
        splits: whether the keys of a long row are shared by several programs.
        least_rows: that its smallest query tile computes, however few queries it has.
        host: seconds that the host takes to launch it.
        waits_for_keys: whether it attends to keys in order while they still come, where it has its kernel for Hopper.
        reads_in_place: whether that kernel reads prefixes where they lie, packed or in pages, and a rank's own rows, beside keys in order.
        stored: by how much it is slower over keys in another dtype than q's, where computing takes the time; None if it is given a copy
            of them in q's dtype.
        fp8_of_heads, fp8_of_tokens: the same where that dtype is fp8, with scales of heads, and with one for each token and head; None
            for ``stored``.
    """

    backend: str
    flops: float
    overhead: float
    tile: int
    paged: float
    copies_pages: tuple[int, ...] | None
    read: float
    stays: bool
    splits: bool
    least_rows: int
    host: float
    waits_for_keys: bool = False
    reads_in_place: bool = False
    stored: float | None = None
    fp8_of_heads: float | None = None
    fp8_of_tokens: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.backend, str):
            raise OptionError(f"KernelCosts.backend={shown(self.backend)}; pass the name of one of cpattn.BACKENDS")
        _check(self, ("flops", "paged", "read"), ("overhead", "tile", "least_rows", "host"))
        _check(self, tuple(name for name in ("stored", "fp8_of_heads", "fp8_of_tokens") if getattr(self, name) is not None), ())

    def slower_over(self, dtype: torch.dtype, scales: ScaleKind | None) -> float:
        """By how much it is slower over keys that are stored in that dtype, with such scales, than over those in q's; 1 over a copy."""
        if self.stored is None:
            return 1.0
        of_fp8 = self.fp8_of_tokens if scales == "token" else self.fp8_of_heads
        return of_fp8 if is_fp8(dtype) and of_fp8 is not None else self.stored

    def reads_pages(self, page_size: int | None) -> bool:
        """Whether there are pages, of a size that it reads as they are."""
        return page_size is not None and self.copies_pages is not None and page_size not in self.copies_pages


@dataclass(frozen=True)
class Machine:
    """A kind of machine. ``dataclasses.replace`` makes another of it, :func:`cpattn.measure_links` one with links as measured.

    >>> import cpattn
    >>> h100 = cpattn.MACHINES["h100-nvlink"]
    >>> h100.multiprocessors, h100.measured
    (132, True)

    Attributes:
        name: by which :data:`cpattn.MACHINES` has it.
        measured: whether its kernels were measured by this project; else they are from data sheets. Links say it of themselves.
        capability: compute capability, of which tile shapes follow.
        multiprocessors: of a GPU.
        kernels: the backends that there are constants for.
        copy: bytes a second that are read and written within a GPU.
        launch: seconds of a kernel of no work within a CUDA graph.
        boost: how much faster attention is on a card that has rested, below its power limit; boost_seconds: how long it stays so.
        host_call, host_launch: seconds that the host takes for a call, and for each kernel beside attention.
        collectives: of ranks of one host.
        peer_memory: the same, or None where there is no such transport.
        across: collectives of a group of several hosts.
        ranks_per_host: GPUs of one host.
    """

    name: str
    measured: bool
    capability: tuple[int, int]
    multiprocessors: int
    kernels: tuple[KernelCosts, ...]
    copy: float
    launch: float
    boost: float
    boost_seconds: float
    host_call: float
    host_launch: float
    collectives: LinkCosts
    peer_memory: LinkCosts | None
    across: LinkCosts
    ranks_per_host: int = 8

    def __post_init__(self) -> None:
        positive = ("multiprocessors", "copy", "boost", "ranks_per_host")
        _check(self, positive, ("launch", "boost_seconds", "host_call", "host_launch"))
        for name in ("multiprocessors", "ranks_per_host"):
            if not isinstance(getattr(self, name), int):
                raise OptionError(f"Machine.{name}={shown(getattr(self, name))}; it must be a whole number")
        if not self.kernels:
            raise OptionError(f"Machine.kernels={shown(self.kernels)}; pass a KernelCosts for each backend, one at least")
        names = [kernel.backend for kernel in self.kernels]
        if len(set(names)) < len(names):
            raise OptionError(f"Machine.kernels are of {', '.join(map(repr, names))}; pass one of each backend")

    @cached_property
    def memo(self) -> Memo[Hashable, Any]:
        """What others have worked out of it, by keys of their own."""
        return Memo(_MOST_REMEMBERED)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled without what is remembered."""
        return type(self), tuple(getattr(self, field.name) for field in fields(self))

    def link(self, transport: str, cp_size: int) -> LinkCosts | None:
        """What carries the messages of a group of that many ranks; None where such a transport cannot. Raises UnknownNameError where
        there is none of that name."""
        if transport not in TRANSPORTS:
            raise UnknownNameError(f"transport={transport!r} is unknown; choose one of {', '.join(map(repr, TRANSPORTS))}")
        if transport == "collectives":
            return self.collectives if cp_size <= self.ranks_per_host else self.across
        return self.peer_memory if cp_size <= self.ranks_per_host else None

    def only(self, *backends: str) -> Machine:
        """The same with the constants of these backends alone, in its own order, such as those that are installed.

        >>> import cpattn
        >>> h100 = cpattn.MACHINES["h100-nvlink"]
        >>> [kernel.backend for kernel in h100.only("flash_attn3", "triton").kernels]
        ['triton', 'flash_attn3']

        Raises UnknownNameError for one that it has no constants of, and OptionError for none.
        """
        known = [kernel.backend for kernel in self.kernels]
        for name in backends:
            if name not in known:
                raise UnknownNameError(f"{self.name!r} has no constants of {shown(name)}; it has those of {', '.join(map(repr, known))}")
        return replace(self, kernels=tuple(kernel for kernel in self.kernels if kernel.backend in backends))

    def rested(self) -> Machine:
        """The same for a call after a rest, as a benchmark makes it: a card at its power limit is slower."""
        return replace(self, kernels=tuple(replace(kernel, flops=kernel.flops * self.boost) for kernel in self.kernels), boost=1.0)


# NCCL between two H100 and two H200: 64 MiB in 295 us, 256 MiB in 996 to 1,105 (measured). It is the same for what is sent to one rank of
# two. In a ring of four H100 8 and 52 MB took 75 and 340 us a hop (peers_4_gpus.csv, 1 x 8k and 64 ragged).
_NVLINK_4 = LinkCosts(
    28 * US, 255 * GB, 255 * GB, 0.7, 0.7, by_kernels=True, host_gather=90 * US, host_shift=200 * US, measured_ranks=2,
    shift_of_many=175 * GB,
)  # fmt: skip
# A kernel that pulls 64 MiB takes 252 us, and a copy engine 195 to 222 (measured). In calls a pull came at 266 to 434 GB/s between two H100
# (late_keys.md, keys first). Flags and the launches around them are in the latency; of a hop they took 16 to 60 us (peers_2_gpus.csv and
# peers_4_gpus.csv, short rings). The kernel that pulls a gather stands in the call's own stream, and hides nothing but late keys. The copy
# engine of a shift has a stream of its own: 256 MiB beside 3.4 ms of attention made that 3% longer (measured).
# Late keys: over half of the pull was hidden, by batch between a quarter and all of it (late_keys.md). Short calls took 8 to 14 us more
# than the launch alone (late_keys.md, short messages), or 16 to 25 up to 4k (peers_2_gpus.csv, in graphs of 32 layers). In a graph of four,
# ranks that begin up to 150 us apart make each layer seem up to 30 us longer. From one rank: NVLink 4 carries 450 GB/s each way (data
# sheet). Between four H100 the keys of a single request came at 156 to 181 GB/s, a third of it, and those of 8 or 64 at 300 (late_keys.md).
_NVLINK_4_PEERS = LinkCosts(
    18 * US, 330 * GB, 330 * GB, 0.0, 0.86, by_kernels=False, host_gather=35 * US, host_shift=120 * US, measured_ranks=2, hides_late=0.55,
    from_one=450 * GB, shift_latency=38 * US, late_latency=10 * US,
)  # fmt: skip
# Stated: a host of eight GPUs has eight adapters of 400 Gb/s (data sheet of DGX H100), of which 90% are taken. A gather uses all of
# them, which is more than NVLink carries above, and a message from one rank to the next one.
_INFINIBAND = LinkCosts(60 * US, 255 * GB, 45 * GB, 0.7, 0.7, by_kernels=True, host_gather=90 * US, host_shift=200 * US)

# Pages as long as its key tiles flash_attn4 would load whole, with what lies after a request's last token.
_FA4_KEY_TILES = (64, 80, 96, 112, 128, 144)
# Sources are tables in benchmarks/results. Rates: attention_gpu.csv, sustained. Overheads and tiles: its short batches, and attention
# alone in layer_gpu.csv. Over pages: backends_gpu_fa3.csv. Reading: 256 x (8k + 1) in attention_gpu.csv, and of flash_attn4 in
# backends_gpu_fa4.csv. Host: transports_2_gpus.csv, whose two processes take twice what one does in prepared_calls_gpu.md; of triton what
# calls take that are done again (the end of that file).
# Stored keys: in fp8, 8 x (8k + 2k) and 1 x 32k in fp8_pages_gpu.csv, where the kernel took 1.36 and 1.38 of its time over bf16 with
# scales of heads, which products in fp16 leave to the end, and 1.63 and 1.67 with those of tokens. In another half precision: stated, as
# fp8 with scales of heads took while it was converted to q's dtype (30k + 2k in fp8_striped_2_gpus.csv).
_H100_KERNELS = (
    KernelCosts(
        "triton", 670e12, 6 * US, 3, 1.0, (), 3.05e12, stays=True, splits=False, least_rows=64, host=12 * US, waits_for_keys=True,
        reads_in_place=True, stored=1.5, fp8_of_heads=1.37, fp8_of_tokens=1.65,
    ),
    KernelCosts("flash_attn4", 697e12, 4 * US, 4, 1.0, _FA4_KEY_TILES, 2.95e12, stays=False, splits=False, least_rows=128, host=280 * US),
    KernelCosts("flash_attn3", 702e12, 4 * US, 2, 1.14, (), 3.05e12, stays=False, splits=True, least_rows=128, host=70 * US),
)  # fmt: skip
H100 = Machine(
    "h100-nvlink",
    measured=True,
    capability=(9, 0),
    multiprocessors=132,
    kernels=_H100_KERNELS,
    # Of 3.35 TB/s (data sheet) the part that H200 reaches of its own.
    copy=2.9e12,
    # layer_gpu.csv, 1k: three kernels beside attention take 5.6 us.
    launch=2 * US,
    # attention_gpu.csv, 1 x 128k: after a rest and sustained. How long: transports_2_gpus.csv, where 2 ms of work were done at the higher
    # rate, and most of 8 ms were not.
    boost=1.09,
    boost_seconds=2.5e-3,
    host_call=60 * US,
    host_launch=18 * US,
    collectives=_NVLINK_4,
    peer_memory=_NVLINK_4_PEERS,
    across=_INFINIBAND,
)
# transports_2_gpus.csv and peers_2_gpus.csv without a rest, of cards whose rates are 6% apart, layer_gpu.csv after one, where H100 and H200
# are as fast; a copy within the device reads and writes 4.27 TB/s (measured).
H200 = replace(
    H100,
    name="h200-nvlink",
    kernels=tuple(replace(kernel, flops=kernel.flops * 1.09 / 1.145, read=kernel.read * 4.25 / 3.05) for kernel in _H100_KERNELS),
    copy=4.27e12,
    boost=1.145,
)
# Stated: H100 of as many hosts, one adapter of 400 Gb/s each. What a GPU does by itself was measured.
H100_INFINIBAND = replace(
    H100,
    name="h100-infiniband",
    across=replace(_INFINIBAND, gather=45 * GB),
    peer_memory=None,
    ranks_per_host=1,
)
# Stated: A100 80GB SXM (data sheet: 108 multiprocessors, 2,039 GB/s of memory, NVLink 3 with 300 GB/s each way), with the parts of those
# rates that H100 reaches. FlashAttention 2: up to 230 TFLOP/s (Dao, arXiv:2307.08691), of which 200 are taken; torch has the same kernel.
_A100_KERNELS = tuple(
    KernelCosts(name, 200e12, 6 * US, 3, 1.0, None, 1.8e12, stays=False, splits=False, least_rows=128, host=host)
    for name, host in (("flash_attn2", 60 * US), ("torch_flash", 60 * US))
)
A100 = replace(
    H100,
    name="a100-nvlink",
    measured=False,
    capability=(8, 0),
    multiprocessors=108,
    kernels=_A100_KERNELS,
    copy=1.75e12,
    boost=1.0,
    collectives=replace(_NVLINK_4, gather=170 * GB, shift=170 * GB, shift_of_many=None, measured_ranks=0),
    peer_memory=replace(_NVLINK_4_PEERS, gather=200 * GB, shift=220 * GB, from_one=300 * GB, measured_ranks=0),
    # Eight adapters of 200 Gb/s (data sheet of DGX A100).
    across=replace(_INFINIBAND, gather=160 * GB, shift=22 * GB),
)
MACHINES: dict[str, Machine] = {machine.name: machine for machine in (H100, H200, H100_INFINIBAND, A100)}
"""The kinds of machines that :func:`cpattn.estimate` knows by name."""


def find_machine(given: Any) -> Machine:
    """The machine of that name, or a caller's own as it is. Raises UnknownNameError or OptionError."""
    if isinstance(given, Machine):
        return given
    if not isinstance(given, str):
        raise OptionError(f"machine={shown(given)}; pass a cpattn.Machine, or the name of one: {', '.join(map(repr, MACHINES))}")
    if given not in MACHINES:
        raise UnknownNameError(f"machine={given!r} is unknown; choose one of {', '.join(map(repr, MACHINES))}, or pass a cpattn.Machine")
    return MACHINES[given]
