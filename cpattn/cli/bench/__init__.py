"""``cpattn bench``: small runs of what ``benchmarks/`` measures at length, for a first look at a machine."""

from __future__ import annotations

import argparse
import json
from typing import Any

from cpattn.cli.batch_file import BATCH_HELP, read_batch
from cpattn.cli.bench import attention, layer, metadata
from cpattn.cli.bench.asked import Asked, Result
from cpattn.cli.bench.device import device, device_name, versions
from cpattn.cli.console import print_table, print_title, say
from cpattn.cli.options import Heads, add_shape_options, check_cp_size, shape_from
from cpattn.cli.traffic import Shape
from cpattn.errors import CPError

_DESCRIPTION = """\
Runs a small benchmark and prints a table: a first look at this machine, in
seconds. Full results, with devices, versions and commands, are in
benchmarks/results/ of the repository. The programs that made them are in
benchmarks/.
"""
_EXAMPLES = """\
examples:
  cpattn bench attention
  cpattn bench layer --batch "8k+1 x 64" --cp 8 --heads 64/8
  cpattn bench metadata --cp 16 --json | jq .measured
"""
_KINDS = {"attention": attention, "layer": layer, "metadata": metadata}


def add_command(commands: Any) -> None:
    """Registers the command with the parser."""
    parser = commands.add_parser(
        "bench",
        help="time the attention, a layer or the metadata on this machine, in a few seconds",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = parser.add_subparsers(title="benchmarks", dest="kind", required=True, metavar="BENCHMARK")
    for kind, module in _KINDS.items():
        kind_parser = kinds.add_parser(kind, help=module.TITLE, description=f"Times {module.TITLE}.")
        work = kind_parser.add_mutually_exclusive_group()
        work.add_argument("--tokens", type=int, metavar="N", help=module.TOKENS_HELP)
        work.add_argument("--batch", metavar="BATCH", help=f"the one batch to measure: {BATCH_HELP}")
        kind_parser.add_argument("--cp", type=int, metavar="N", help=module.CP_HELP)
        kind_parser.add_argument("--seconds", type=float, default=2.0, metavar="S", help="about how many seconds to measure (default: 2)")
        kind_parser.add_argument("--json", action="store_true", help="print JSON instead of a table, with device and versions")
        if module.HAS_SHAPE:
            sizes = kind_parser.add_argument_group("sizes (default: 32/8 heads in bfloat16 on a GPU, 8/2 heads in float32 on a CPU)")
            add_shape_options(sizes, heads=None, head_dim=128, dtype=None)
        kind_parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the benchmark. Returns 0."""
    module = _KINDS[options.kind]
    if options.tokens is None:
        options.tokens = module.TOKENS[device().type]
    asked = _asked(options)
    if options.json:
        print(json.dumps(as_json(options.kind, asked, module.measure(asked)), indent=2))
        return 0
    say("; ".join([device_name(), ", ".join(f"{name} {version}" for name, version in versions().items())]))
    print_title(module.TITLE)
    result = module.measure(asked)
    print_table(result.header, result.lines, left=module.LEFT)
    print()
    say(f"{result.note}\nfull results: {module.RESULTS} of the repository")
    return 0


def as_json(kind: str, asked: Asked, result: Result) -> dict[str, Any]:
    """A run as JSON's own types: times in seconds, flops of a run's causal work."""
    return {
        "benchmark": kind,
        "title": _KINDS[kind].TITLE,
        "device": {"type": device().type, "name": device_name()},
        "versions": versions(),
        "options": {
            "tokens": asked.tokens if asked.batch is None else None,
            "batch": asked.written or None,
            "cp_size": asked.cp_size,
            "attention": None if asked.shape is None else asked.shape._asdict(),
            "seconds": asked.seconds,
        },
        "measured": result.records,
        "note": result.note,
    }


def _asked(options: argparse.Namespace) -> Asked:
    if options.tokens < 1 or not 0 < options.seconds < float("inf"):
        raise CPError(f"--tokens {options.tokens} --seconds {options.seconds}: both must be above 0")
    if options.cp is not None:
        check_cp_size(options.cp)
    batch = None if options.batch is None else read_batch(options.batch)
    shape = _shape(options) if _KINDS[options.kind].HAS_SHAPE else None
    return Asked(options.tokens, batch, options.batch or "", options.cp, shape, options.seconds)


def _shape(options: argparse.Namespace) -> Shape:
    """The sizes of a common model on a GPU, and of a quarter of it on a CPU, where they were left out."""
    on_gpu = device().type == "cuda"
    options.heads = options.heads or Heads(32 if on_gpu else 8)
    options.dtype = options.dtype or ("bfloat16" if on_gpu else "float32")
    return shape_from(options)
