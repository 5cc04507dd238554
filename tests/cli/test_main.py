"""The command line as a whole: help, exit codes, and what a terminal and a file get."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import traceback
from typing import NoReturn

import pytest

from cpattn.cli.main import main

COMMANDS = ["plan", "picture", "demo", "env", "bench"]
_END = "-- the end of a command --"
PLAN = ["plan", "--batch", "0+3670, 4096+128, 77+1", "--cp", "8"]


def in_terminal(commands: list[list[str]], columns: int, **environment: str) -> str:
    """What the commands write to a pseudo-terminal of that width, each followed by a line that is none of its own.

    In a child of this process, which has imported what a new one would take seconds to import."""
    pty = pytest.importorskip("pty")
    import fcntl
    import struct
    import termios

    child, ours = pty.fork()
    if not child:
        _run_and_exit(commands, environment)
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    os.write(ours, b"\n")
    written = b""
    try:
        while piece := os.read(ours, 65536):
            written += piece
    except OSError:  # the other side is closed
        pass
    os.close(ours)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, written.decode()
    return written.decode().replace("\r\n", "\n")


def _run_and_exit(commands: list[list[str]], environment: dict[str, str]) -> NoReturn:
    """Never returns to the test that was forked."""
    code = 1
    try:
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
        for name in ("COLUMNS", "NO_COLOR"):
            os.environ.pop(name, None)
        os.environ.update({"TERM": "xterm-256color"} | environment)
        sys.stdin.readline()  # now the terminal has its width
        codes = []
        for command in commands:
            codes.append(main(command))
            print(_END, flush=True)
        code = int(any(codes))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def without_colors(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


@pytest.mark.parametrize("columns", [80, 200])
def test_a_terminal_gets_colours_and_no_line_is_too_wide(columns: int) -> None:
    pytest.importorskip("rich")
    plans = [PLAN, [*PLAN, "--compare", "--pad-to", "128"], ["picture", "ring", *PLAN[1:]]]
    commands = [*plans, ["env"], ["bench", "metadata", "--seconds", "0.1"]]
    *texts, rest = in_terminal(commands, columns).split(_END + "\n")
    assert (len(texts), rest) == (len(commands), "")
    for command, text in zip(commands, texts, strict=True):
        assert "\x1b[" in text, command
        plain = without_colors(text)
        assert "\x1b" not in plain, command
        assert max(map(len, plain.splitlines())) <= columns, command


def test_no_color_is_respected() -> None:
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", in_terminal([PLAN], 80, NO_COLOR="1"))


def test_a_file_gets_plain_text() -> None:
    commands = [PLAN, [*PLAN, "--compare"], ["env"], ["picture", "work", *PLAN[1:]]]
    # One after another in one process, which takes seconds to start.
    runs = "; ".join(f"assert main({command!r}) == 0; print({_END!r}, flush=True)" for command in commands)
    program = f"from cpattn.cli.main import main; {runs}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, env=os.environ | {"FORCE_COLOR": "1"})
    assert not re.search(rb"[\x00-\x09\x0b-\x1f\x7f]", done.stdout)
    assert all(part.strip() for part in done.stdout.split(_END.encode())[:-1])
    assert done.stderr == b""
    assert done.stdout.isascii()


def test_without_rich_a_terminal_gets_plain_text(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    text = in_terminal([PLAN], 80)
    assert "\x1b" not in text
    assert "query-key pairs" in text


def test_a_reader_that_stops_early_is_no_error() -> None:
    many = ",".join(["9+9"] * 3000)
    process = subprocess.Popen(
        [sys.executable, "-m", "cpattn", "plan", "--batch", many, "--cp", "2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0


def test_help_names_each_command_and_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = capsys.readouterr().out
    for word in [*COMMANDS, "exit codes", "prefix+new", "cpattn demo"]:
        assert word in text


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert len(capsys.readouterr().out.splitlines()) > 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "cpattn: the following arguments are required: COMMAND; `cpattn --help` explains"),
        (["plam"], "invalid choice: 'plam'"),
        (["plan", "--batch", "9", "--window", "4"], "cpattn plan: unrecognized arguments: --window 4; `cpattn plan --help` explains"),
        (
            ["bench", "attention", "--batch", "9", "x"],
            "cpattn bench attention: unrecognized arguments: x; `cpattn bench attention --help` explains",
        ),
        (["plan", "--cp", "2"], "cpattn plan: the following arguments are required: --batch; `cpattn plan --help` explains"),
        (["plan", "--batch", "0+1", "--cp", "two"], "invalid int value: 'two'"),
        (["plan", "--batch", "0+1", "--cp", "2", "--partition", "zig"], "invalid choice: 'zig'"),
        (["bench"], "cpattn bench: the following arguments are required: BENCHMARK"),
        (["plan", "--batch", "0+1", "--cp", "9" * 5000], "invalid int value: '999"),
    ],
)
def test_wrong_arguments_are_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert len(error) < 500


def test_a_batch_alone_is_planned_for_four_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--batch", "131072"]) == 0
    assert "\n4 ranks, zigzag partition, balanced remainder, 32,768 rows a rank" in capsys.readouterr().out
    assert main(["picture", "ring", "--batch", "0+16k"]) == 0
    assert "rank 3 computes" in capsys.readouterr().out


def test_an_interrupt_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cpattn.cli.plan.plan_from", interrupted)
    assert main(PLAN) == 130
    assert capsys.readouterr().err == "cpattn plan: interrupted\n"
