"""Python calls under cpattn/, and the files that they are in, of one steady-state cp_attention call: what the host has to do.

python benchmarks/count_calls.py [--name calls] [--results FOLDER] [--functions all_gather]

Rank 0 of two (and of three) processes over gloo, and of a loopback of one. A call is the start of a function, or of a generator or
comprehension where Python has frames for these (a comprehension has none from 3.12 on); what torch and others do is not counted.
Counts do not depend on the machine. The tensors are on the CPU, where numbers in page tables are looked at in every call, and
backend `cpu` loops over the rows: what it does is in the first count alone.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from timing import RESULTS

import cpattn
from cpattn.testing import ProcessRanks

HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE = 8, 2, 16, 16
PACKAGE = Path(cpattn.__file__).parent
WARM_UPS = 3
# Of each function, as (file, name).
Starts: TypeAlias = "Counter[tuple[str, str]]"
HEADER = [
    "call",
    "group",
    "all calls",
    "calls without the backend's",
    "files without the backend's",
    "calls without the backend's by folder",
]
BACKEND = ("cpu", "attention/cpu.py")

# Of each: the strategy, the batch, where its keys lie, and over how many ranks it is counted.
PREFILL, DECODE = [(0, 96), (0, 32)], [(48, 1), (80, 1), (16, 1), (33, 1)]
CALLS: dict[str, tuple[str, list[tuple[int, int]], str, list[int]]] = {
    "all_gather, dense": ("all_gather", PREFILL, "dense", [2, 1]),
    "ring, dense": ("ring", PREFILL, "dense", [3, 2, 1]),
    "all_gather over pages": ("all_gather", [(32, 48), (0, 32)], "pages", [2, 1]),
    "pass_q, decode over sharded pages": ("pass_q", DECODE, "sharded pages", [2, 1]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="calls")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--functions", metavar="CALL", help="list the functions of the calls whose name begins so, and write nothing")
    options = parser.parse_args()
    found = {(name, 1): count(name) for name in CALLS}
    for size in (2, 3):
        with ProcessRanks(size) as ranks:
            for name, (*_, sizes) in CALLS.items():
                if size in sizes:
                    found[name, size] = ranks.run(count, name)[0]
    if options.functions is not None:
        print_functions({key: starts for key, (starts, _) in found.items() if key[0].startswith(options.functions)})
        return
    rows = []
    for name, (*_, sizes) in CALLS.items():
        if 3 in sizes:
            (second, of_second), (third, of_third) = found[name, 2], found[name, 3]
            rows.append([name, "a hop: what the third rank adds", *figures(third - second, of_third - of_second)])
        rows += [
            [name, "loopback of 1" if size == 1 else f"gloo, {size} ranks", *figures(*found[name, size])] for size in sizes if size < 3
        ]
    text = report(rows)
    print(text)
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / f"{options.name}.md").write_text(text)


def count(name: str) -> tuple[Starts, int]:
    """How often each function of the package starts in one call on this rank, and how often others do so for the backend.

    The first time that the backend's function starts is a call of the library's; what it calls is the backend's own.
    """
    call = prepare(name)
    for _ in range(WARM_UPS):
        call()
    starts: Starts = Counter()
    folder = f"{PACKAGE}/"
    depth, of_backend = 0, 0

    def note(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal depth, of_backend
        if event not in ("call", "return"):
            return
        code = frame.f_code
        is_ours = event == "call" and code.co_filename.startswith(folder)
        if depth:
            of_backend += is_ours
            depth += 1 if event == "call" else -1
        elif is_ours:
            place = code.co_filename.removeprefix(folder)
            starts[place, code.co_name] += 1
            depth = int(place == BACKEND[1])

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return starts, of_backend


def prepare(name: str) -> Callable[[], Any]:
    """The call, on this rank of the default group, or on the only one."""
    strategy, batch, keys, _ = CALLS[name]
    size, rank, group = 1, 0, None
    if dist.is_initialized():
        size, rank, group = dist.get_world_size(), dist.get_rank(), dist.group.WORLD
    torch.manual_seed(0)
    shards = [[len(range(owner, prefix, size)) for owner in range(size)] for prefix, _ in batch]
    plan = cpattn.plan(batch, cp_size=size, prefix_shards=shards if keys == "sharded pages" else None)
    meta = plan.metadata(rank)
    q, k, v = (torch.randn(meta.rows, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    cache = None
    if keys != "dense":
        width = -(-max(prefix + extend for prefix, extend in batch) // PAGE_SIZE)
        table = torch.arange(len(batch) * width, dtype=torch.int32).view(len(batch), width)
        k_pages, v_pages = (torch.randn(table.numel(), PAGE_SIZE, KV_HEADS, HEAD_DIM) for _ in range(2))
        cache = cpattn.PagedKV(k_pages, v_pages, table)
    return lambda: cpattn.cp_attention(q, k, v, meta, group=group, kv_cache=cache, strategy=strategy, backend=BACKEND[0])


def figures(starts: Starts, of_backend: int) -> list[str]:
    folders: Counter[str] = Counter()
    for (file, _), number in starts.items():
        folders[file.partition("/")[0] + "/" if "/" in file else file] += number
    files, total = len({file for file, _ in starts}), sum(starts.values())
    return [str(total + of_backend), str(total), str(files), ", ".join(f"{folder} {number}" for folder, number in folders.most_common())]


def print_functions(found: dict[tuple[str, int], Starts]) -> None:
    for (name, size), starts in found.items():
        print(f"\n{name}, {size} rank{'s' * (size > 1)}: {sum(starts.values())} calls without the backend's")
        for (file, function), number in starts.most_common():
            print(f"{number:5} {file} {function}")


def report(rows: list[list[str]]) -> str:
    # The words that it was started with, whatever the folder.
    command = " ".join(["python", "benchmarks/count_calls.py", *sys.argv[1:]])
    lines = ["# Python calls of one steady-state call", "", f"`{command}` at commit {commit()}", ""]
    lines += [f"Python {platform.python_version()}, torch {torch.__version__}, cpattn {cpattn.__version__}.", ""]
    lines += [
        "Starts of functions under cpattn/ on rank 0 in the call after three alike, backend `cpu`, tensors on the CPU: what each "
        "layer but the first of a batch does. What the backend calls itself, row by row, is in the first count alone.",
        "",
    ]
    lines += ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER), *("| " + " | ".join(row) + " |" for row in rows), ""]
    return "\n".join(lines)


def commit() -> str:
    """Of the checkout that cpattn is imported from."""
    git = ["git", "-C", str(PACKAGE.parent)]
    try:
        name = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "--", "cpattn"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name + " with changes" * bool(changed.strip())


if __name__ == "__main__":
    main()
