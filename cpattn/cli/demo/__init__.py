"""``cpattn demo``: each strategy over real ranks, checked against the float64 oracle."""

from __future__ import annotations

import argparse
from typing import Any

from cpattn.cli.batch_file import BATCH_HELP
from cpattn.cli.console import Cell, Styled, print_table, print_title, say
from cpattn.cli.demo.comparison import Outcome, measure
from cpattn.cli.demo.place import DEVICES, place_for
from cpattn.cli.demo.setting import defaults_in_words, setting_for
from cpattn.cli.options import add_shape_options
from cpattn.cli.plan import print_layout, print_shares
from cpattn.cli.speed import causal_flops, in_flops

_DESCRIPTION = """\
Runs each exchange strategy over several ranks of this machine, and compares
every output with a float64 oracle. Where there is a GPU for each rank, ranks
are processes over NCCL. Without a GPU they are processes over gloo on the CPU.
With fewer GPUs than ranks they are threads that share the first GPU.

exit codes: 0 all exact, 1 an output was off, 2 the input was refused
"""


def add_command(commands: Any) -> None:
    """Registers the command with the parser."""
    parser = commands.add_parser(
        "demo",
        help="run a batch over several ranks, on GPUs where there are some, and check every output against float64",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--batch", metavar="BATCH", help=f"{BATCH_HELP} ({defaults_in_words()})")
    parser.add_argument("--cp", type=int, metavar="N", help="number of ranks (default: one for each GPU; 4 with fewer than two GPUs)")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="where to compute (default: auto, GPUs where there are some)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the random tensors (default: 0)")
    sizes = parser.add_argument_group("sizes (default: 8/2 heads of 64 on the CPU, 32/8 heads of 128 on GPUs)")
    add_shape_options(sizes, heads=None, head_dim=None)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the demo. Returns 0 if every output is as exact as on one device, else 1."""
    place = place_for(options.device, options.cp)
    setting = setting_for(options, place)
    plan = setting.plan
    print_shares(plan)
    print_title("who owns which token")
    print_layout(plan)
    print()
    say(f"{setting.shape}, seed {setting.seed}; {place}")
    flops = causal_flops(setting.shape, sum(plan.rank_pairs))
    outcomes = list(measure(setting, place))
    print_title(f"against float64, over all {plan.num_tokens:,} tokens")
    header = ["strategy", "backend", "max error", "relative RMSE", "allowed", "exact", "ms", "speed", "bytes sent"]
    print_table(header, [_line(outcome, flops, place.num_devices) for outcome in outcomes], left=(0, 1))
    each = "by each GPU" if place.num_devices > 1 else "by all ranks together"
    print()
    say(f"ms: a call on the slowest rank; speed: causal work alone, {each}; bytes sent: by a rank in a call")
    all_fine = all(outcome.fine for outcome in outcomes)
    print("every rank's output is as exact as one device's" if all_fine else "an output is OFF: see the table")
    return 0 if all_fine else 1


def _line(outcome: Outcome, flops: float, num_devices: int) -> list[Cell]:
    verdict = Styled("yes", "green") if outcome.fine else Styled("NO", "bold red")
    is_alone = outcome.bytes_sent is None
    speed = in_flops(flops / outcome.seconds / (1 if is_alone else num_devices))
    errors = [f"{number:.2e}" for number in (outcome.largest, outcome.error, outcome.bound)]
    sent = "" if is_alone else f"{outcome.bytes_sent:,}"
    return [outcome.name, outcome.backend, *errors, verdict, f"{outcome.seconds * 1e3:.1f}", speed, sent]
