"""``cpattn bench``: small runs of what ``benchmarks/`` measures in full, for a first look at a machine."""

from __future__ import annotations

import argparse
from typing import Any

from cpattn.cli.bench import attention, layer, metadata
from cpattn.cli.bench.device import machine
from cpattn.cli.console import print_table, print_title, say
from cpattn.errors import CPError

_DESCRIPTION = """\
Runs a benchmark in small and prints a table: a first look at this machine,
in seconds. The results in full, with their devices, versions and commands,
are in benchmarks/results/ of the repository, and the programs that made them
in benchmarks/.
"""
_KINDS = {"attention": attention, "layer": layer, "metadata": metadata}


def add_command(commands: Any) -> None:
    """Registers the command with the parser."""
    parser = commands.add_parser(
        "bench",
        help="time the attention, a layer or the metadata on this machine, in small",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = parser.add_subparsers(title="benchmarks", dest="kind", required=True, metavar="BENCHMARK")
    for kind, module in _KINDS.items():
        kind_parser = kinds.add_parser(kind, help=module.TITLE, description=f"Times {module.TITLE}.")
        kind_parser.add_argument(
            "--tokens", type=int, default=module.TOKENS, metavar="N", help=f"{module.TOKENS_HELP} (default: {module.TOKENS})"
        )
        kind_parser.add_argument("--seconds", type=float, default=2.0, metavar="S", help="about how long to measure (default: 2)")
        kind_parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the benchmark. Returns 0."""
    if options.tokens < 1 or not 0 < options.seconds < float("inf"):
        raise CPError(f"--tokens {options.tokens} --seconds {options.seconds}: both must be above 0")
    module = _KINDS[options.kind]
    say(machine())
    print_title(module.TITLE)
    header, rows, note = module.measure(options.tokens, options.seconds)
    print_table(header, rows, left=module.LEFT)
    print()
    say(f"{note}\nin full: {module.RESULTS} of the repository")
    return 0
