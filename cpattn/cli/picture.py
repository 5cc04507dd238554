"""``cpattn picture``: a plan, a ring's hops, or each rank's work, as a picture or as text."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import cpattn
from cpattn.cli.batch_file import read_batch
from cpattn.cli.console import columns, print_marks
from cpattn.cli.more_even import more_even
from cpattn.cli.options import add_plan_options, cache_from, check_cp_size, plan_from
from cpattn.cli.plan import print_layout
from cpattn.metadata.draw import rank_mark
from cpattn.metadata.partition import PARTITIONS, remainders_of
from cpattn.viz import draw_plan_picture, draw_ring_picture, draw_work_picture, ring_as_text, ring_schedule, work_as_text
from cpattn.viz.palette import rank_text_color

_EXAMPLES = """\
examples:
  cpattn picture plan --batch "4+11, 0+5, 6+1" --cp 2 -o plan.svg
  cpattn picture plan --batch "4+11, 6+1" --cp 2 --owner striped:2
  cpattn picture ring --batch 16k --cp 4
  cpattn picture work --batch "0+3670, 77+1" --cp 8 -o work.png
"""
_KINDS = {
    "plan": "which rank computes which queries over which keys, the rows that each rank holds, and what it keeps of a sharded cache",
    "ring": "the hops of a ring over time: what each rank computes, and what is in flight meanwhile",
    "work": "each rank's query-key pairs as bars, for several partitions beside each other",
}


def add_command(commands: Any) -> None:
    """Registers the command with the parser."""
    parser = commands.add_parser(
        "picture",
        help="draw a plan, a ring's hops over time, or each rank's work",
        description="Draws a picture: to a file with -o, as text in the terminal without.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = parser.add_subparsers(title="pictures", dest="kind", required=True, metavar="PICTURE")
    for kind, description in _KINDS.items():
        kind_parser = kinds.add_parser(kind, help=description, description=f"Draws {description}.")
        add_plan_options(kind_parser, several_partitions=kind == "work")
        if kind == "ring":
            kind_parser.add_argument(
                "--transfer",
                type=float,
                default=0.5,
                metavar="X",
                help="time of a transfer, where 1 is that of a mean hop (default: 0.5)",
            )
        kind_parser.add_argument(
            "-o", "--output", type=Path, metavar="FILE", help="where to draw: a .png, .svg or .pdf (needs cpattn[viz])"
        )
        kind_parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Draws the picture. Returns 0."""
    {"plan": _plan, "ring": _ring, "work": _work}[options.kind](options)
    if options.output is not None:
        print(f"drawn to {options.output}")
    return 0


def _plan(options: argparse.Namespace) -> None:
    plan = plan_from(options)
    if options.output is None:
        print_layout(plan)
    else:
        draw_plan_picture(plan, options.output)


def _ring(options: argparse.Namespace) -> None:
    schedule = ring_schedule(plan_from(options), options.transfer)
    if options.output is None:
        width = max(20, min(160, columns() - len(f"rank {options.cp - 1} computes ||")))
        styles = {rank_mark(rank): rank_text_color(rank) for rank in range(options.cp)}
        print_marks(ring_as_text(schedule, width).splitlines(), styles)
        print(f"ranks compute {schedule.busy:.0%} of the time, if a transfer lasts {schedule.transfer:g} of a mean hop")
    else:
        draw_ring_picture(schedule, options.output)


def _work(options: argparse.Namespace) -> None:
    batch = read_batch(options.batch)
    check_cp_size(options.cp)
    cache = cache_from(options, batch)
    plans = [
        cpattn.plan(batch, options.cp, partition=name, remainder=options.remainder, pad_to=options.pad_to, **cache)
        for name in options.partition or [name for name in PARTITIONS if options.remainder in remainders_of(name)]
    ]
    if options.output is None:
        beside = max(len(line) for line in work_as_text(plans, 1).splitlines() if "|" in line) - 1
        print_marks(work_as_text(plans, max(10, min(100, columns() - beside))).splitlines(), {"#": rank_text_color(4)})
    else:
        draw_work_picture(plans, options.output)
    hint = more_even(plans[0])
    if hint is not None:
        print(hint)
