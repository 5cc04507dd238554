"""The command line: reads the arguments and calls the command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from cpattn.cli import demo
from cpattn.errors import CPError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit code: 0 fine, 1 a check failed, 2 the input was refused."""
    parser = argparse.ArgumentParser(prog="cpattn", description="Exact causal attention over a context that is split across ranks.")
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    demo.add_command(commands)
    options = parser.parse_args(arguments)
    try:
        code: int = options.run(options)
        return code
    except CPError as error:
        print(f"cpattn {options.command}: {error}", file=sys.stderr)
        return 2
