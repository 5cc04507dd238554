"""``cpattn env`` never fails, whatever is broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch

import cpattn
from cpattn.cli import env
from cpattn.cli.env_tables import print_section
from cpattn.cli.main import main
from cpattn.kernels.release import Verdict


def raising(failure: BaseException) -> Callable[..., NoReturn]:
    def fail(*_: Any, **__: Any) -> NoReturn:
        raise failure

    return fail


def found(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The report; printing it as tables works as well."""
    assert main(["env"]) == 0
    assert "versions" in capsys.readouterr().out
    assert main(["env", "--json"]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def test_what_it_reports(capsys: pytest.CaptureFixture[str]) -> None:
    report = found(capsys)
    assert report["versions"]["torch"] == {"version": torch.__version__, "problem": None, "purpose": "needed"}
    assert report["versions"]["cpattn"]["version"] == cpattn.__version__
    assert report["devices"][0]["device"] == "cpu"
    assert set(report["transports"]) == {"gloo", "nccl"}
    assert list(report["backends"]) == list(cpattn.BACKENDS)
    assert report["backends"]["cpu"]["features"]["window"] == "it has no sliding window"
    assert report["backends"]["cpu"]["features"]["Dv!=D"] is None
    assert set(report["backends"]["reference"]["features"].values()) == {None}
    assert report["strategies"] == list(cpattn.STRATEGIES)
    for backend in report["backends"].values():
        assert backend["usable"] == (backend["why_not"] is None)


def test_which_kernel_and_launch_are_used(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    kernel, launch = "the attention kernel for Hopper", "launches by the CUDA driver"
    assert found(capsys)["triton"] == {name: {"used": False, "why": "there is no CUDA device"} for name in (kernel, launch)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    for name, answer in (("HOPPER_KERNEL", Verdict(False, "Triton 3.5 cannot: x")), ("DIRECT_LAUNCH", Verdict(None, "not known"))):
        monkeypatch.setattr(f"cpattn.kernels.release.{name}", SimpleNamespace(verdict=lambda answer=answer: answer))
    section = env.triton_release()
    assert section == {kernel: {"used": False, "why": "Triton 3.5 cannot: x"}, launch: {"used": None, "why": "not known"}}
    print_section("triton", section)
    printed = capsys.readouterr().out
    assert f"{kernel}  no" in printed
    assert "to be checked" in printed
    assert f"{kernel}: Triton 3.5 cannot: x" in printed
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert env.triton_release()[kernel] == {"used": False, "why": "there is no GPU of compute capability 9.0"}
    monkeypatch.setattr("cpattn.kernels.release.DIRECT_LAUNCH", SimpleNamespace(verdict=raising(SystemExit("gone"))))
    assert env.triton_release()[launch] == {"used": False, "why": "SystemExit: gone"}


FAILURES = [RuntimeError("two\nlines"), SystemExit(1), ImportError("undefined symbol: x"), OSError(), AssertionError("")]


@pytest.mark.parametrize("failure", FAILURES, ids=repr)
@pytest.mark.parametrize("target", ["torch.cuda.is_available", "torch.distributed.is_available", "platform.python_version", "os.cpu_count"])
def test_a_broken_probe_spoils_itself_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], target: str, failure: BaseException
) -> None:
    monkeypatch.setattr(target, raising(failure))
    report = found(capsys)
    assert set(report) == {"versions", "devices", "transports", "backends", "triton", "strategies"}
    assert report["strategies"] == list(cpattn.STRATEGIES)
    assert type(failure).__name__ in json.dumps(report) or target == "torch.cuda.is_available"


@pytest.mark.parametrize("failure", FAILURES, ids=repr)
def test_a_broken_package_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, failure: BaseException
) -> None:
    (tmp_path / "flash_attn_interface.py").write_text(f"raise {failure!r}")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "flash_attn_interface", raising=False)
    entry = found(capsys)["versions"]["flash-attn-3"]
    assert entry["version"] == "unknown"
    assert entry["problem"].startswith(f"cannot be imported: {type(failure).__name__}")
    assert "\n" not in entry["problem"]


def test_a_broken_backend_spoils_itself_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("cpattn.attention.backend.Backend.why_not", raising(SystemExit("gone")))
    assert {entry["why_not"] for entry in found(capsys)["backends"].values()} == {"SystemExit: gone"}


def test_tables_that_can_not_be_printed_are_printed_plainly(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("cpattn.cli.env_tables.print_table", raising(ValueError("no tables")))
    assert main(["env"]) == 0
    assert "ValueError: no tables" in capsys.readouterr().out


def test_an_interrupt_is_not_swallowed() -> None:
    with pytest.raises(KeyboardInterrupt):
        env.guarded(raising(KeyboardInterrupt()), str)


@pytest.mark.parametrize(
    ("module", "failure"), [("torch", "OSError('libcudart.so.12: cannot open shared object file')"), ("numpy", "SystemExit(3)")]
)
def test_without_what_cpattn_needs(tmp_path: Path, module: str, failure: str) -> None:
    """Most of cpattn itself cannot be imported then."""
    (tmp_path / module).mkdir()
    (tmp_path / module / "__init__.py").write_text(f"raise {failure}")
    path = os.pathsep.join([str(tmp_path), str(Path(cpattn.__file__).parents[1])])
    for extra in ([], ["--json"]):
        done = subprocess.run(
            [sys.executable, "-m", "cpattn", "env", *extra],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"PYTHONPATH": path},
        )
        assert done.returncode == 0, done.stderr
        assert f"cannot be imported: {failure.split('(')[0]}" in done.stdout
        assert done.stderr == ""
    assert json.loads(done.stdout)["versions"]["rich"]


def run_beside_a_broken_torch(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "torch.py").write_text("raise OSError('broken')")
    path = os.pathsep.join([str(folder), str(Path(cpattn.__file__).parents[1])])
    command = [sys.executable, "-m", "cpattn", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": path})


def test_other_commands_do_not_hide_a_broken_torch(tmp_path: Path) -> None:
    done = run_beside_a_broken_torch(tmp_path, "plan", "--batch", "0+9", "--cp", "2")
    assert done.returncode == 1
    assert "OSError: broken" in done.stderr


def test_the_version_needs_no_torch(tmp_path: Path) -> None:
    assert run_beside_a_broken_torch(tmp_path, "--version").stdout == f"cpattn {cpattn.__version__}\n"
