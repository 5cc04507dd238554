"""How tests/sanitize_peers.py waits for its runs, with what stands in for the sanitizer."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import sanitize_peers
import torch

# One run says more than a pipe holds, and one does not end in time, nor does what it has started.
STAND_IN = """#!/bin/sh
case "$2" in
initcheck) head -c 300000 /dev/zero | tr '\\0' '\\n' ;;
racecheck) { sleep 20; touch "$FOLDER/ended"; } & echo $! >"$FOLDER/pid"; wait ;;
esac
echo "========= ERROR SUMMARY: 0 errors"
"""


def test_runs_that_say_much_or_do_not_end_hold_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sanitizer = tmp_path / "sanitizer"
    sanitizer.write_text(STAND_IN)
    sanitizer.chmod(0o755)
    monkeypatch.setattr("sys.argv", ["sanitize_peers.py", "--sanitizer", str(sanitizer)])
    monkeypatch.setenv("FOLDER", str(tmp_path))
    monkeypatch.setattr(sanitize_peers, "MOST_SECONDS", 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    try:
        assert sanitize_peers.main() == 1
    finally:
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    assert not (tmp_path / "ended").exists()
    assert [line for line in capsys.readouterr().out.splitlines() if line] == [
        "memcheck, ranks as threads: 0 errors",
        "racecheck, ranks as threads: it did not end as it should",
        "initcheck, ranks as threads: 0 errors",
        "memcheck, ranks as processes: 0 errors",
    ]
