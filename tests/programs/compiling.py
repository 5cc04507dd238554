"""Runs a program that compiles kernels, in a process of its own: the interpreter takes what the compiler does not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def said_by_compiling(module: str) -> str:
    """What this module prints; it has to end as it should."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": f".{os.pathsep}tests"}
    done = subprocess.run([sys.executable, "-m", module], capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
