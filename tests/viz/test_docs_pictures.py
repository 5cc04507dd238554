"""Each picture in docs/pictures is what the command beside it makes."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from pathlib import Path

import pytest

from cpattn.cli.main import main

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "docs" / "pictures"
PAGE = (PICTURES / "README.md").read_text()
COMMANDS = re.findall(r"`(cpattn picture [^`]* -o (docs/pictures/\S+))`", PAGE)
PRINTED = re.findall(r"```sh\n(cpattn [^\n]*)\n```\n\n```text\n(.*?)```", PAGE, re.DOTALL)

pytest.importorskip("matplotlib")


def structure(svg: Path) -> tuple[list[str], Counter[str], list[tuple[int, ...]]]:
    """Its texts, how many shapes have which colour, and the straight-edged shapes themselves, to a tenth of a point: what
    stays from one version of matplotlib and its fonts to another."""
    source = svg.read_text()
    shapes = re.findall(r'<path d="([ML0-9.\sz-]+)"\s+(?:clip-path="[^"]*"\s+)?style="fill', source)
    corners = [tuple(round(10 * float(number)) for number in re.findall(r"-?\d+\.?\d*", shape)) for shape in shapes]
    return re.findall(r"<!--(.*?)-->", source, re.DOTALL), Counter(re.findall(r"fill: (#\w+)", source)), corners


def test_every_picture_has_its_command() -> None:
    assert sorted(path for _, path in COMMANDS) == sorted(f"docs/pictures/{path.name}" for path in PICTURES.glob("*.*g"))


@pytest.mark.parametrize(("command", "path"), COMMANDS, ids=[Path(path).stem for _, path in COMMANDS])
def test_a_picture_is_what_its_command_makes(command: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    again = tmp_path / "again.svg"
    assert main(shlex.split(command.replace(path, str(again)))[1:]) == 0
    assert structure(again)[2]
    assert structure(again) == structure(ROOT / path)
    assert (ROOT / path).stat().st_size < 200_000


@pytest.mark.parametrize(("command", "printed"), PRINTED, ids=["plan", "work"])
def test_text_is_what_its_command_prints(command: str, printed: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split(command)[1:]) == 0
    assert capsys.readouterr().out == printed
