"""The example runs by itself and checks itself; test_docs.py has how it says it is started."""

from __future__ import annotations

from programs.example_runs import together


def test_example_checks_itself() -> None:
    for exited, printed in together("hugging_face", 2):
        assert not exited
        assert "relative RMSE of the logits" in printed
