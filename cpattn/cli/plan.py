"""``cpattn plan``: how a batch is laid out over the ranks, and what that costs."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import cpattn
from cpattn.cli import estimates
from cpattn.cli.console import Cell, Styled, columns, print_marks, print_table, print_title, say
from cpattn.cli.estimates import estimates_of, print_estimates
from cpattn.cli.options import add_plan_options, add_shape_options, plan_from, shape_from
from cpattn.cli.traffic import Shape, in_words, keys_in_words, needed_bytes, partition_in_words, problem_of, rest_bytes, strategy_bytes
from cpattn.exchange.registry import STRATEGIES
from cpattn.machine import MACHINES
from cpattn.metadata.draw import describe_imbalance, describe_plan, rank_mark, share_table
from cpattn.metadata.partition import PARTITIONS, remainders_of
from cpattn.metadata.plan import Plan
from cpattn.viz.palette import rank_text_color

_DESCRIPTION = """\
Prints how a batch is laid out over the ranks: each rank's tokens and
query-key pairs, and how far the busiest rank is from the mean. Then what each
strategy sends in one attention call, and which rank owns which token. Nothing
is computed, and no GPU is needed.
"""
_EXAMPLES = """\
examples:
  cpattn plan --batch 131072
  cpattn plan --batch "0+3670, 4096+128, 8k+1 x 256" --cp 8
  cpattn plan --batch examples/batches/mixed.json --cp 4 --compare
  cpattn plan --batch 0+131072 --cp 8 --machine h100-nvlink
  cpattn plan --batch 32k --heads 128 --head-dim 192 --v-head-dim 128 --latent-dim 576
  cpattn plan --batch "4+10, 0+5" --cp 2 --draw plan.png
  cpattn plan --batch "100k+1 x 8" --cp 4 --owner striped:16
  cpattn plan --batch "0+3670" --cp 8 --json | jq .pair_imbalance
"""


def add_command(commands: Any) -> None:
    """Registers the command with the parser."""
    parser = commands.add_parser(
        "plan",
        help="print how a batch is laid out over the ranks, and what each strategy sends",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_plan_options(parser)
    parser.add_argument(
        "--token-cost", type=int, metavar="N", help="with --partition auto: what the rest of a layer pays for a token, in query-key pairs"
    )
    sizes = parser.add_argument_group("sizes of the attention, for the bytes that are sent")
    add_shape_options(sizes, heads=32, head_dim=128)
    sizes.add_argument(
        "--latent-dim", type=int, metavar="N", help="MLA: a latent of this size travels, and is expanded to the heads (DeepSeek-V3: 576)"
    )
    output = parser.add_argument_group("output")
    output.add_argument("--compare", action="store_true", help="compare all partitions and remainders, side by side")
    output.add_argument(
        "--machine", choices=list(MACHINES), help="estimate what a call costs on such a machine: strategy, transport, overlap and backend"
    )
    output.add_argument("--json", action="store_true", help="print JSON instead of tables")
    output.add_argument("--draw", type=Path, metavar="FILE", help="also draw the plan to a .png, .svg or .pdf (needs cpattn[viz])")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Prints the plan. Returns 0."""
    shape = shape_from(options)
    plan = plan_from(options, problem_of(None, shape), options.machine, options.token_cost)
    if options.draw is not None:
        from cpattn.viz import draw_plan_picture

        draw_plan_picture(plan, options.draw)
    if options.compare:
        plans = [
            replace(plan, partition=partition, remainder=remainder) for partition in PARTITIONS for remainder in remainders_of(partition)
        ]
        if options.json:
            print(json.dumps({"plans": [as_json(other, shape, options.machine) for other in plans]}, indent=2))
        else:
            _print_comparison(plans, shape, options.machine, options.token_cost)
    elif options.json:
        print(json.dumps(as_json(plan, shape, options.machine), indent=2))
    elif options.machine is not None:
        found = estimates_of(plan, shape, options.machine)
        say(describe_plan(plan))
        print_estimates(found, shape, plan.cp_size)
    else:
        _print_plan(plan, shape, options.token_cost)
    if options.draw is not None and not options.json:
        print(f"\ndrawn to {options.draw}")
    return 0


def as_json(plan: Plan, shape: Shape, machine: str | None = None) -> dict[str, Any]:
    """The plan as JSON's own types. Tokens and pairs are counts, sizes are bytes. With a machine also what a call would cost."""
    costs = {} if machine is None else {"machine": machine, "estimates": estimates.as_json(estimates_of(plan, shape, machine))}
    held_tokens = plan.held_lens.sum(axis=0).tolist()
    return {
        "cpattn": cpattn.__version__,
        "batch": [request._asdict() for request in plan.batch],
        "cp_size": plan.cp_size,
        "partition": str(plan.partition),
        "remainder": plan.remainder,
        "pad_to": plan.pad_to,
        "num_tokens": plan.num_tokens,
        "num_prefix_tokens": plan.num_prefix_tokens,
        "rows": plan.rows,
        "ranks": [
            {"rank": rank, "tokens": tokens, "padding": plan.rows - tokens, "pairs": pairs, "held": held}
            for rank, (tokens, pairs, held) in enumerate(zip(plan.rank_tokens, plan.rank_pairs, held_tokens, strict=True))
        ],
        "token_imbalance": plan.token_imbalance,
        "pair_imbalance": plan.pair_imbalance,
        "cache": plan.sharded_by if plan.sharded else "replicated",
        "fingerprint": plan.fingerprint,
        "chunks": [chunk._asdict() for chunk in plan.chunks],
        "attention": shape._asdict(),
        "needed_bytes_per_rank": needed_bytes(plan, shape),
        "rest_bytes_per_rank": rest_bytes(plan, shape),
        "strategies": {name: {"bytes_sent_per_rank": sent} for name, sent in strategy_bytes(plan, shape).items()},
        **costs,
    }


def print_shares(plan: Plan) -> None:
    """The layout in words, a table with a line a rank, and the imbalance."""
    say(describe_plan(plan))
    print_title("each rank's share")
    header, lines = share_table(plan)
    busiest, bar_columns = max([*plan.rank_pairs, 1]), min(60, max(10, columns() - 56 - 15 * plan.sharded))
    table: list[list[Cell]] = []
    for rank, line in enumerate(lines[:-1]):
        bar = "#" * round(plan.rank_pairs[rank] / busiest * bar_columns)
        table.append([Styled(line[0], f"bold {rank_text_color(rank)}"), *line[1:], Styled(bar, rank_text_color(rank))])
    table.append([*lines[-1], ""])
    print_table([*header, "work"], table, left=(0, len(header)))
    print()
    say(describe_imbalance(plan))


def _print_plan(plan: Plan, shape: Shape, token_cost: int | None) -> None:
    print_shares(plan)
    print_title("what each rank sends in one attention call")
    print(f"{shape}\n")
    sent = strategy_bytes(plan, shape)
    print_table(
        ["strategy", "what travels", "bytes", "that is"],
        [[name, STRATEGIES[name].travels, f"{size:,}", in_words(size)] for name, size in sent.items()],
        left=(0, 1),
    )

    print()
    _say_and_why(f"partition: {partition_in_words(plan, shape, None, token_cost)}")
    if not plan.sharded:
        _say_and_why(f"keys of an all_gather: {keys_in_words(plan, shape)}")

    print_title("who owns which token" + (", and who holds it" if plan.sharded else ""))
    print_layout(plan)


def _say_and_why(text: str) -> None:
    """What is before the last colon, and then what explains it."""
    what, _, why = text.rpartition(": ")
    say(what)
    say(f"({why})")


def print_layout(plan: Plan) -> None:
    """The plan as a text picture that fits the terminal."""
    # What stands beside the marks; with a single mark it is widest, as that stands for the most tokens.
    beside = max((len(line) for line in plan.draw(1).splitlines() if "|" in line), default=0) - 1
    width = max(10, min(60 if columns() <= 120 else 150, columns() - beside))
    print_marks(plan.draw(width).splitlines(), {rank_mark(rank): rank_text_color(rank) for rank in range(plan.cp_size)})


def _print_comparison(plans: list[Plan], shape: Shape, machine: str | None, token_cost: int | None) -> None:
    """Metrics down, plans across."""
    first = plans[0]
    say(f"{describe_plan(first).splitlines()[0]}, {first.cp_size} ranks")
    names = ["remainder", "rows a rank", "padding, all ranks", "tokens, max / mean", "pairs, max / mean"]
    names += [
        "keys needed of others",
        *(["the other keys"] if not first.sharded else []),
        *(f"{name}: sent" for name in strategy_bytes(first, shape)),
    ]
    names += [] if machine is None else [f"us on {machine}"]
    names += [f"pairs of rank {rank}" for rank in range(first.cp_size)]
    best = min(plan.pair_imbalance for plan in plans)
    print_title("query-key pairs, and what each rank sends")
    cells = [_comparison_column(plan, shape, best, machine) for plan in plans]
    print_table(["partition", *(str(plan.partition) for plan in plans)], [list(row) for row in zip(names, *cells, strict=True)])
    print()
    if first.cp_size > 1:
        _say_and_why(partition_in_words(first, shape, machine, token_cost).partition("; ")[2])
    say(f"bytes are those of one attention call, {shape}; of the rank with the most")
    say("keys needed of others: those that a rank's queries see and that it does not hold, which travel before the attention")
    if not first.sharded:
        say("the other keys: what pages that every rank holds whole get beside or after it")
    if machine is not None:
        say("us: of the way that is estimated to be the fastest, as a CUDA graph")


def _comparison_column(plan: Plan, shape: Shape, best: float, machine: str | None) -> list[Cell]:
    imbalance = f"{plan.pair_imbalance:.4f}"
    return [
        plan.remainder if plan.cuts_alike else "none",
        f"{plan.rows:,}",
        f"{plan.cp_size * plan.rows - plan.num_tokens:,}",
        f"{plan.token_imbalance:.4f}",
        Styled(imbalance, "bold green") if plan.pair_imbalance == best else imbalance,
        in_words(needed_bytes(plan, shape)),
        *([in_words(rest_bytes(plan, shape))] if not plan.sharded else []),
        *(in_words(sent) for sent in strategy_bytes(plan, shape).values()),
        *([] if machine is None else [f"{estimates_of(plan, shape, machine)[0].graph * 1e6:,.1f}"]),
        *(f"{pairs:,}" for pairs in plan.rank_pairs),
    ]
