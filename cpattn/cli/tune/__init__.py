"""``cpattn tune``: times tile shapes of the Triton attention kernel on this GPU, and stores the fastest.

A command, as measuring within a call would wait for the device, break the capture of CUDA graphs, and let ranks choose
differently.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from cpattn.cli.bench.device import machine
from cpattn.cli.console import Styled, print_table, print_title, say
from cpattn.cli.options import add_shape_options, shape_from
from cpattn.cli.progress import Progress
from cpattn.cli.tune.batches import make_batches
from cpattn.cli.tune.choice import LEAST_GAIN, Outcome, Run, Timer, choose_fastest, in_words
from cpattn.cli.tune.exactness import Exactness
from cpattn.cli.tune.target import Target, find_target
from cpattn.cli.tune.timing import gpu_median_seconds, wait
from cpattn.errors import CPError
from cpattn.kernels.tile_candidates import tile_candidates
from cpattn.kernels.tile_table import VARIABLE, read_table, store, table_path

_DESCRIPTION = """\
Times tile shapes of the Triton attention kernel on this GPU, for one head dim
and dtype, and stores the fastest in a file that the kernel then takes them from:
$CPATTN_TILES, or cpattn/tiles.json in the user's cache (XDG_CACHE_HOME, or
~/.cache). Takes some minutes, most of them for compiling.

Other tiles sum a query's keys in another order, so that the last bits of a
result differ: give all ranks the same file. Without one, all take the defaults.
"""


def add_command(commands: Any) -> None:
    """Registers the command with the parser."""
    parser = commands.add_parser(
        "tune",
        help="find the attention kernel's fastest tile shapes for this GPU",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_shape_options(parser, heads=32, head_dim=128)
    parser.add_argument("--v-in-k", action="store_true", help="v is k's first columns (multi-head latent attention)")
    parser.add_argument(
        "--seconds", type=float, default=20.0, metavar="S", help="about how long to measure, without compiling (default: 20)"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Times, prints and stores. Returns 0."""
    if not 0 < options.seconds < float("inf"):
        raise CPError(f"--seconds {options.seconds}: it must be above 0")
    target = find_target(shape_from(options), options.v_in_k)
    path = table_path()
    if path is None:
        raise CPError(f"there is nowhere to store what is found, as {VARIABLE} is empty or there is no home directory; set it to a path")
    tune(target, path, options.seconds)
    return 0


def tune(target: Target, path: Path, seconds: float, timer: Timer = gpu_median_seconds) -> Outcome:
    """Times the candidates for the target, prints what was found, and stores it in the file."""
    # A file that can not be used is refused before minutes go by.
    read_table(path)
    say(f"{machine()}, Triton {target.key.triton}")
    print_title(f"tile shapes for {target.shape}{', v in k' if target.key.v_in_k else ''}")
    sets = tile_candidates(*target.of_kernel)
    batches = make_batches(target)
    runs: dict[str, Run] = {batch.name: partial(batch.attend, target) for batch in batches}
    with Progress(len(sets) + 3) as progress:
        outcome = choose_fastest(sets, runs, seconds, timer, wait, Exactness(target).why_wrong, progress.step)
    print_title("ms, medians")
    for batch in batches:
        say(f"{batch.name}: {batch.meaning}")
    print()
    _print_times(outcome, list(runs))
    print()
    for shapes, reason in outcome.failures.items():
        say(f"{in_words(shapes)}: left out: {reason}")
    _store(outcome, target, path)
    return outcome


def _print_times(outcome: Outcome, batches: list[str]) -> None:
    rows = []
    for shapes in sorted(outcome.seconds, key=outcome.relative, reverse=True):
        times = [f"{outcome.seconds[shapes][batch] * 1e3:,.3f}" for batch in batches]
        note = "default" if shapes == outcome.default else ""
        name = in_words(shapes)
        cells = [*times, f"{outcome.relative(shapes):.3f}", note]
        rows.append([Styled(name, "bold green") if shapes == outcome.winner else name, *cells])
    print_table(["shapes", *batches, "speed", ""], rows, left=(0, len(batches) + 2))
    say("\nshapes: query rows x keys of a block, warps, stages; speed: beside the default, the geometric mean over the batches")


def _store(outcome: Outcome, target: Target, path: Path) -> None:
    if outcome.winner != outcome.default:
        store(path, target.key, target.entry(outcome.winner, outcome.gain))
        say(f"{in_words(outcome.winner)} is {outcome.gain:.1%} faster than the default, and is stored in {path}")
        say("give all ranks this file: other tiles sum a query's keys in another order")
        return
    best = outcome.best_other
    if best is None or outcome.relative(best) <= 1:
        say("the default shapes are the fastest: nothing to store")
    else:
        gain = outcome.relative(best) - 1
        say(f"the default shapes stay: {in_words(best)} is {gain:.1%} faster, and below {LEAST_GAIN:.0%} that may be noise")
    if target.key in read_table(path):
        store(path, target.key, None)
        say(f"what {path} had for this is taken out")
