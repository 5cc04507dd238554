"""All that bench_peers.py times, by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

from peers import ours, ring_flash_attention, torch_context_parallel
from peers.ours import NO_TRANSFER
from peers.sglang_form import sglang_form
from peers.ulysses import ulysses
from peers.work import Call, Work

# "partition": "auto" over the layout that partition="auto" takes. "launch": a rank's attention alone, on keys in order. "one GPU": that of
# the whole batch.
Kind = Literal["auto", "partition", "fixed", "no transfer", "launch", "one GPU", "peer"]


class Variant(NamedTuple):
    """How to make a rank's call for a batch.

    Attributes:
        beside: the variant without transfers that its exposed communication is told by; empty for the fastest of those.
        is_of_speedup: whether it is timed for the speed-up by length, over batches where nothing else is.
        ranks: of each of the groups that make the call side by side; 0 for one group of all.
    """

    make: Callable[[Work], Call]
    kind: Kind
    beside: str = ""
    is_of_speedup: bool = False
    ranks: int = 0


STRATEGIES = ("all_gather", "ring", "ulysses")


def all_variants(device_type: str, backends: tuple[str, ...], strategies: tuple[str, ...] = STRATEGIES) -> dict[str, Variant]:
    """On GPUs or, to try it, on a CPU."""
    is_gpu = device_type == "cuda"
    kinds = ("peer_memory", "collectives") if is_gpu else ("collectives",)
    found = {}
    for label, transport in (("auto", "auto"), (f"auto, {NO_TRANSFER}", NO_TRANSFER)):
        make = partial(ours.cp_attention, strategy="auto", transport=transport, backend="auto")
        found[f"cpattn {label}"] = Variant(make, "auto" if label == "auto" else "no transfer", f"cpattn auto, {NO_TRANSFER}", True)
    by_auto = partial(ours.cp_attention, strategy="auto", transport="auto", backend="auto", partition="auto")
    found["cpattn auto, partition auto"] = Variant(by_auto, "partition")
    for strategy in strategies:
        for backend in backends:
            alone = f"cpattn {strategy}, {NO_TRANSFER}, {backend}"
            for transport in (*kinds, NO_TRANSFER):
                make = partial(ours.cp_attention, strategy=strategy, transport=transport, backend=backend)
                kind: Kind = "no transfer" if transport == NO_TRANSFER else "fixed"
                found[f"cpattn {strategy}, {transport}, {backend}"] = Variant(make, kind, alone)
    for backend in backends:
        found[f"launch alone, {backend}"] = Variant(partial(ours.launch, backend=backend), "launch", is_of_speedup=True)
        found[f"one GPU, {backend}"] = Variant(partial(ours.one_gpu, backend=backend), "one GPU", is_of_speedup=True)
    return found | {
        "SGLang's form": Variant(sglang_form, "peer"),
        "Ulysses as USP": Variant(ulysses, "peer"),
        "ring-flash-attn zigzag": Variant(ring_flash_attention.zigzag_varlen, "peer"),
        "ring-flash-attn llama3": Variant(ring_flash_attention.llama3_varlen, "peer"),
        "torch context_parallel": Variant(torch_context_parallel.by_torchs_kernels, "peer"),
        "torch context_parallel, FA4": Variant(torch_context_parallel.by_flash_attn4, "peer"),
    }
