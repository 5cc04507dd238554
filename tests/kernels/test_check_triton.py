"""The triton backend through all that strategies ask of a kernel, in the interpreter where there is no GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import cpattn
from cpattn.testing import check_backend

pytest.importorskip("triton")


def test_the_triton_backend_passes(device: str) -> None:
    # The interpreter takes tensors of the CPU, which the backend does not claim.
    anywhere = replace(cpattn.BACKENDS["triton"], device_types=None, refuses=lambda call: None)
    report = check_backend(anywhere, device, dtype=torch.float16)
    assert report.ok, str(report)
    assert {row.verdict for row in report.rows} == {"holds"}
