"""Printing: coloured by rich in a terminal, if it is installed; plain text everywhere else, without control characters."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Collection, Sequence
from textwrap import wrap
from typing import Any, NamedTuple, TypeAlias

from cpattn.metadata.draw import text_table

# What is not a terminal has no width; this suits a log.
_PIPED_COLUMNS = 100
_GAP = "  "


class Styled(NamedTuple):
    """A table's cell with a style of rich."""

    text: str
    style: str


Cell: TypeAlias = str | Styled


def rich_console() -> Any:
    """A console of rich on standard output; None where that is no terminal, or without rich."""
    if not sys.stdout.isatty():
        return None
    try:
        from rich.console import Console
    except Exception:  # a broken rich is no reason to print nothing
        return None
    return Console(highlight=False, markup=False, emoji=False)


def columns() -> int:
    """How wide the output may be."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else _PIPED_COLUMNS


def say(text: str) -> None:
    """Prints lines of text, broken between words where they are wider than a terminal."""
    width = columns() if sys.stdout.isatty() else None
    for line in text.splitlines():
        print("\n".join(wrap(line, width, break_on_hyphens=False)) if width and line.strip() else line, flush=True)


def print_table(header: Sequence[str], rows: Sequence[Sequence[Cell]], left: Collection[int] = (0,)) -> None:
    """Prints a table; the columns numbered in ``left`` are aligned to the left, all others to the right.

    One that is too wide is cut into several, each of which begins with the first column again.
    """
    for number, block in enumerate(_blocks(header, rows, columns())):
        if number:
            print()
        kept = [position for position, column in enumerate(block) if column in left]
        _print_block([header[column] for column in block], [[row[column] for column in block] for row in rows], kept)


def _blocks(header: Sequence[str], rows: Sequence[Sequence[Cell]], most: int) -> list[list[int]]:
    """Which columns stand beside each other."""
    widths = [max(len(_text(line[column])) for line in [header, *rows]) for column in range(len(header))]
    blocks = [[0]]
    for column in range(1, len(header)):
        if len(blocks[-1]) > 1 and sum(widths[other] + len(_GAP) for other in blocks[-1]) + widths[column] > most:
            blocks.append([0])
        blocks[-1].append(column)
    return blocks


def _print_block(header: Sequence[str], rows: Sequence[Sequence[Cell]], left: Collection[int]) -> None:
    console = rich_console()
    if console is None:
        print(text_table(header, [[_text(cell) for cell in row] for row in rows], left))
        return
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    # With the box's own blank, columns are as far apart as those of a plain table.
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number in left else "right")
    for row in rows:
        table.add_row(*(Text(cell.text, style=cell.style) if isinstance(cell, Styled) else Text(cell) for cell in row))
    console.print(table)


def _text(cell: Cell) -> str:
    return cell.text if isinstance(cell, Styled) else cell


def print_title(text: str) -> None:
    """A heading, with an empty line above it."""
    console = rich_console()
    if console is None:
        print(f"\n{text}\n")
    else:
        console.print(f"\n{text}\n", style="bold")


def print_marks(lines: Sequence[str], styles: dict[str, str]) -> None:
    """Prints lines of text; what stands between the first two bars of a line is coloured, character by character."""
    console = rich_console()
    if console is None:
        print("\n".join(lines))
        return
    from rich.text import Text

    for line in lines:
        text = Text(line, no_wrap=True, overflow="crop")
        parts = line.split("|")
        if len(parts) == 3:
            begin = len(parts[0]) + 1
            for at, mark in enumerate(parts[1], start=begin):
                if mark in styles:
                    text.stylize(styles[mark], at, at + 1)
        console.print(text)
