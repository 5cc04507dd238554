"""How far a command is: a progress bar in a terminal with rich, a line for each step everywhere else."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from cpattn.cli.console import rich_console


class Progress:
    """Shows which of ``steps`` steps is under way::

    with Progress(2) as progress:
        progress.step("computing the oracle")
        ...
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._bar: Any = None
        self._task: Any = None
        self._begun = 0

    def step(self, what: str) -> None:
        """Says what begins now; the step before is done."""
        self._begun += 1
        if self._bar is None:
            print(f"[{self._begun}/{self._steps}] {what}", flush=True)
        else:
            self._bar.update(self._task, completed=self._begun - 1, description=what)

    def __enter__(self) -> Progress:
        console = rich_console()
        if console is not None and console.is_terminal and not console.is_dumb_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as RichProgress

            wide = TextColumn("{task.description}", markup=False)
            self._bar = RichProgress(wide, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console, transient=True)
            self._task = self._bar.add_task("", total=self._steps)
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
