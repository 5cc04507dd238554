"""The command line: reads the arguments and calls the command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NoReturn

from cpattn.cli import env
from cpattn.errors import CPError
from cpattn.version import __version__

_DESCRIPTION = """\
Exact causal attention over a context that is split across ranks (GPUs or processes).

A batch is a list of requests. Each has a prefix, tokens that are in the KV
cache already, and new tokens. Write prefix+new for each, with commas between
them, or name a JSON file:

  cpattn plan --batch 128k
  cpattn plan --batch "0+3670, 4096+128, 8k+1 x 256" --cp 8
  cpattn plan --batch examples/batches/mixed.json --cp 8

New here? Start with `cpattn demo`: it needs no GPU, and takes a few seconds.
"""
_EXIT_CODES = """\
exit codes: 0 fine, 1 a check failed, 2 the input was refused, 130 interrupted
`cpattn COMMAND --help` explains a command.
"""

_LONGEST = 400


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, which names the way to the fix."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """A command refuses what it does not know itself: argparse would hand it up, to a parser whose help has no options."""
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return options, unknown

    def error(self, message: str) -> NoReturn:
        # An argument of thousands of characters would be repeated.
        message = message if len(message) <= _LONGEST else f"{message[: _LONGEST - 3]}..."
        print(f"{self.prog}: {message}; `{self.prog} --help` explains", file=sys.stderr)
        sys.exit(2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit code: 0 fine, 1 a check failed, 2 the input was refused, 130 interrupted."""
    given = sys.argv[1:] if arguments is None else arguments
    # What is broken, such as torch, is what `cpattn env` has to say, and what the other commands need. The version needs nothing.
    options = parser(only_env=list(given[:1]) in (["env"], ["--version"])).parse_args(given)
    try:
        code: int = options.run(options)
        sys.stdout.flush()
        return code
    except CPError as error:
        print(f"cpattn {options.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"cpattn {options.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough; what is left in the buffer must not be written at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def parser(only_env: bool = False) -> argparse.ArgumentParser:
    """The parser of all commands, or of ``cpattn env`` alone."""
    top = OneLineParser(prog="cpattn", description=_DESCRIPTION, epilog=_EXIT_CODES, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--version", action="version", version=f"cpattn {__version__}")
    commands = top.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    for command in [env] if only_env else _commands():
        command.add_command(commands)
    return top


def _commands() -> list[ModuleType]:
    from cpattn.cli import bench, demo, picture, plan

    return [plan, picture, demo, env, bench]
