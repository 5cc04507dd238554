"""What runs on one of two GPUs during layers of cp_attention, over the memory of peers and over NCCL: from torch's profiler, as a picture.

PYTHONPATH=. python benchmarks/trace_layer.py [--ranks 2] [--results FOLDER]
PYTHONPATH=. python benchmarks/trace_layer.py --draw

The first needs GPUs, and writes each kernel's begin and length as a CSV; the second draws it, and needs matplotlib.
"""

from __future__ import annotations

import argparse
import csv
from functools import partial
from pathlib import Path
from typing import NamedTuple

RESULTS = Path(__file__).parent / "results"
TOKENS, LAYERS = 32768, 2
KINDS = {"peer_memory": "over the memory of peers", "collectives": "over NCCL"}
HEADER = ["over", "kernel", "begin, us", "us"]
# What kernels are, by a part of their names, and in which colour they are drawn; all others wait.
SORTS = {
    "attention": (("attention",), "#0072B2"),
    "keys come from the other GPU": (("exchange_", "pull_", "nccl", "Memcpy PtoP"), "#D55E00"),
    "own keys are written where they are read": (("post_", "pack"), "#009E73"),
    "put in order": (("gather", "move", "put"), "#E69F00"),
}
OTHERS = "wait", "#999999"


class Event(NamedTuple):
    """A kernel on the GPU; times in us, from the first one's begin."""

    over: str
    kernel: str
    begin: float
    length: float

    @property
    def sort(self) -> tuple[str, str]:
        """What it does, and its colour."""
        for what, (parts, colour) in SORTS.items():
            if any(part in self.kernel for part in parts):
                return what, colour
        return OTHERS


def traced(kind: str) -> list[Event]:
    """On this rank, of the replay of a graph."""
    import torch
    import torch.distributed as dist
    from torch.profiler import ProfilerActivity, profile

    import cpattn

    meta = cpattn.build_metadata([(0, TOKENS)], dist.get_world_size(), dist.get_rank(), device="cuda")
    torch.manual_seed(dist.get_rank())
    q, k, v = (torch.randn(meta.rows, heads, 128, device="cuda", dtype=torch.bfloat16) for heads in (32, 8, 8))
    group = cpattn.transport(kind=kind)  # type: ignore[arg-type]
    call = partial(cpattn.cp_attention, q, k, v, meta, group=group, backend="triton", strategy="all_gather")
    call()
    torch.cuda.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(LAYERS):
            call()
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        dist.all_reduce(torch.zeros(1, device="cuda"))
        torch.cuda.synchronize()
        dist.barrier()
        torch.cuda.synchronize()
        graph.replay()
        torch.cuda.synchronize()
    found = [
        (event.name, event.time_range.start, event.time_range.elapsed_us())
        for event in trace.events() or []
        if event.device_type.name == "CUDA" and not event.name.startswith("cuda")
    ]
    found = sorted((event for event in found if event[2] > 0), key=lambda event: event[1])
    # The replay's are those after the barriers'.
    last = max((i for i, (name, *_) in enumerate(found) if "AllReduce" in name or "barrier" in name.lower()), default=-1)
    begin = found[last + 1][1]
    graph.reset()
    return [Event(KINDS[kind], name[:60], round(start - begin, 1), round(length, 1)) for name, start, length in found[last + 1 :]]


def measure(ranks: int, path: Path) -> None:
    from gpu_timing import gpu_machine

    from cpattn.testing import ProcessRanks

    with ProcessRanks(ranks, timeout=120, transport="nccl") as started:
        events = [event for kind in KINDS for event in started.run(traced, kind)[0]]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([HEADER, *events])
    path.with_suffix(".md").write_text(
        f"# Kernels of {LAYERS} layers, on one of {ranks} GPUs\n\n`python benchmarks/trace_layer.py`\n\n{gpu_machine()}\n\n"
        f"One request of {TOKENS:,} tokens, bf16, 32 query and 8 key/value heads, D = 128, `all_gather` with `triton`, as a CUDA graph, "
        f"by torch's profiler on rank 0. [{path.name}.csv]({path.name}.csv) has each kernel.\n\n![The kernels]({path.name}.png)\n"
    )


def draw(path: Path) -> None:
    """A line for the attention, and one for what brings its keys."""
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    with path.with_suffix(".csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    events = [Event(row["over"], row["kernel"], float(row["begin, us"]), float(row["us"])) for row in rows]
    figure, places = plt.subplots(len(KINDS), 1, sharex=True, figsize=(11, 4.2), layout="constrained")
    seen: dict[str, str] = {}
    for axes, over in zip(places, KINDS.values(), strict=True):
        for event in events:
            if event.over == over:
                what, colour = event.sort
                seen[what] = colour
                axes.broken_barh(
                    [(event.begin, event.length)], (0 if what == "attention" else 1, 0.8), color=colour, edgecolor="white", lw=0.4
                )
        axes.set_yticks([0.4, 1.4], ["attention", "its keys"])
        axes.set_title(over, loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    places[-1].set_xlabel("us")
    handles = [Patch(color=colour) for colour in seen.values()]
    figure.legend(handles, seen, frameon=False, fontsize=8, ncols=4, loc="outside lower center")
    figure.suptitle(f"{LAYERS} layers of {TOKENS // 1024}k tokens on one of two GPUs, as a CUDA graph")
    figure.savefig(path.with_suffix(".png"), dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--draw", action="store_true", help="only draw what was measured")
    options = parser.parse_args()
    path = options.results / f"trace_{options.ranks}_gpus"
    if options.draw:
        draw(path)
    else:
        measure(options.ranks, path)


if __name__ == "__main__":
    main()
