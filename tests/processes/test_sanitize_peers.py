"""How tests/sanitize_peers.py waits for its runs, with what stands in for the sanitizer."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import sanitize_peers
import torch

# One run says more than a pipe holds, and one does not end in time, nor does what it has started.
STAND_IN = """#!/bin/sh
case "$2" in
initcheck) head -c 300000 /dev/zero | tr '\\0' '\\n' ;;
racecheck) { sleep 30; touch "$FOLDER/slept"; } & echo $! >"$FOLDER/child"; wait ;;
esac
echo "========= ERROR SUMMARY: 0 errors"
touch "$FOLDER/ended $$"
"""


def test_runs_that_say_much_or_do_not_end_hold_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sanitizer, child = tmp_path / "sanitizer", tmp_path / "child"
    sanitizer.write_text(STAND_IN)
    sanitizer.chmod(0o755)

    def when_all_but_one_have_ended() -> float:
        """However long they take on a busy machine."""
        for _ in range(1000):
            if len(list(tmp_path.glob("ended *"))) == 3 and child.exists() and child.read_text():
                break
            time.sleep(0.02)
        return time.monotonic()

    monkeypatch.setattr("sys.argv", ["sanitize_peers.py", "--sanitizer", str(sanitizer)])
    monkeypatch.setenv("FOLDER", str(tmp_path))
    monkeypatch.setattr(sanitize_peers, "MOST_SECONDS", 1)
    monkeypatch.setattr(sanitize_peers, "time", SimpleNamespace(monotonic=when_all_but_one_have_ended))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    try:
        assert sanitize_peers.main() == 1
    finally:
        os.kill(int(child.read_text()), signal.SIGKILL)
    # Nobody has waited for it.
    assert not (tmp_path / "slept").exists()
    assert [line for line in capsys.readouterr().out.splitlines() if line] == [
        "memcheck, ranks as threads: 0 errors",
        "racecheck, ranks as threads: it did not end as it should",
        "initcheck, ranks as threads: 0 errors",
        "memcheck, ranks as processes: 0 errors",
    ]
