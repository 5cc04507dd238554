"""The environment report as tables."""

from __future__ import annotations

from collections.abc import Callable
from textwrap import fill
from typing import Any

from cpattn.cli.console import Cell, Styled, columns, print_table, print_title

_GOOD, _BAD = "green", "bold red"


def print_section(name: str, section: Any) -> None:
    """Prints one section of the report."""
    print_title(name)
    if isinstance(section, dict) and "failure" in section:
        print(f"this could not be found out: {section['failure']}")
        return
    _SECTIONS[name](section)


def _versions(section: dict[str, dict[str, str | None]]) -> None:
    rows: list[list[Cell]] = []
    for package, entry in section.items():
        state: Cell = Styled("BROKEN" if entry["version"] else "MISSING", _BAD) if entry["problem"] else (entry["version"] or "-")
        rows.append([package, state, entry["purpose"] or ""])
    print_table(["package", "version", "for"], rows, left=(0, 1, 2))
    _print_reasons({package: entry["problem"] for package, entry in section.items()})


def _devices(section: list[dict[str, Any]]) -> None:
    header = ["device", "name", "cores", "capability", "GiB"]
    rows = []
    for entry in section:
        cells = [str(entry.get(key, "")) for key in ("device", "name", "cores", "capability", "memory_gib")]
        rows.append([cells[0], cells[1] or "-", *cells[2:]])
    print_table(header, rows, left=(0, 1))
    _print_reasons({entry["device"]: entry.get("problem") for entry in section})


def _transports(section: dict[str, dict[str, str | None]]) -> None:
    print_table(
        ["transport", "usable", "version"],
        [[name, _yes_no(entry["problem"] is None), entry["version"] or "-"] for name, entry in section.items()],
        left=(0, 1, 2),
    )
    _print_reasons({name: entry["problem"] for name, entry in section.items()})


def _backends(section: dict[str, dict[str, Any]]) -> None:
    features = list(dict.fromkeys(feature for entry in section.values() for feature in entry["features"]))
    rows: list[list[Cell]] = []
    for name, entry in section.items():
        can = [_yes_no(entry["features"][feature] is None) if entry["features"] else "" for feature in features]
        rows.append([name, Styled(entry["device"], _GOOD) if entry["usable"] else _yes_no(False), *can])
    print_table(["backend", "on", *features], rows, left=range(2 + len(features)))
    _print_reasons({name: entry["why_not"] for name, entry in section.items()})
    _print_reasons({f"{name} is": entry["build"] for name, entry in section.items()})
    for name, entry in section.items():
        _print_reasons({f"{name}, {feature}": reason for feature, reason in entry["features"].items()})


def _strategies(section: list[str]) -> None:
    print(", ".join(section))


def _triton(section: dict[str, dict[str, Any]]) -> None:
    answers: dict[bool | None, Cell] = {True: Styled("yes", _GOOD), False: Styled("no", _BAD), None: "to be checked"}
    print_table(
        ["what is fast in backend triton", "used"], [[name, answers[entry["used"]]] for name, entry in section.items()], left=(0, 1)
    )
    _print_reasons({name: entry["why"] for name, entry in section.items()})


def _yes_no(yes: bool) -> Cell:
    return Styled("yes", _GOOD) if yes else Styled("no", _BAD)


def _print_reasons(reasons: dict[str, str | None]) -> None:
    given = {name: reason for name, reason in reasons.items() if reason}
    for name, reason in given.items():
        print(fill(f"{name}: {reason}", columns(), initial_indent="  ", subsequent_indent="      ", break_on_hyphens=False))


_SECTIONS: dict[str, Callable[[Any], None]] = {
    "versions": _versions,
    "devices": _devices,
    "transports": _transports,
    "backends": _backends,
    "triton": _triton,
    "strategies": _strategies,
}
