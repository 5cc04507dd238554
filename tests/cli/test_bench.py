"""``cpattn bench``: every line is there, on whatever machine; the figures are its own affair."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import cpattn
from cpattn.cli.bench.asked import made_batches
from cpattn.cli.bench.device import device, timings
from cpattn.cli.main import main
from cpattn.cli.speed import causal_flops
from cpattn.cli.traffic import Shape

SMALL = ["--heads", "4/2", "--head-dim", "16", "--dtype", "float32"]


def found(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """The one JSON document on stdout."""
    assert main(["bench", *arguments, "--seconds", "0.01", "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    document: dict[str, Any] = json.loads(captured.out)
    return document


@pytest.mark.parametrize("tokens", [1, 70])
@pytest.mark.parametrize(
    ("kind", "words", "lines"),
    [("attention", ["backend"], 3), ("layer", list(cpattn.STRATEGIES), 3 * len(cpattn.STRATEGIES)), ("metadata", ["cp_size"], 12)],
)
def test_it_prints_a_table(capsys: pytest.CaptureFixture[str], kind: str, words: list[str], lines: int, tokens: int) -> None:
    assert main(["bench", kind, "--tokens", str(tokens), "--seconds", "0.01"]) == 0
    text = capsys.readouterr().out
    for word in [*words, torch.__version__, cpattn.__version__, "benchmarks/results/", "medians"]:
        assert word in text
    table = text.split("\n\n")[2].splitlines()
    assert len(table) >= 2 + lines


@pytest.mark.parametrize("batch", ["40, 64+3 x 2", "5+0", "0+1"])
def test_json_has_all_numbers(capsys: pytest.CaptureFixture[str], batch: str) -> None:
    document = found(capsys, "layer", "--batch", batch, "--cp", "3", *SMALL)
    plan = cpattn.plan({"40, 64+3 x 2": [(0, 40), (64, 3), (64, 3)], "5+0": [(5, 0)], "0+1": [(0, 1)]}[batch], 3)
    assert document["benchmark"] == "layer"
    assert document["device"]["type"] == device().type
    assert document["versions"]["torch"] == torch.__version__
    shape = {"heads": 4, "kv_heads": 2, "head_dim": 16, "v_head_dim": 16, "dtype": "float32", "itemsize": 4, "latent_dim": None}
    assert document["options"] == {"tokens": None, "batch": batch, "cp_size": 3, "attention": shape, "seconds": 0.01}
    assert [line["strategy"] for line in document["measured"]] == list(cpattn.STRATEGIES)
    for line in document["measured"]:
        assert (line["batch"], line["cp_size"], line["rank"]) == (batch, 3, 1)
        assert (line["num_requests"], line["num_tokens"], line["num_prefix_tokens"]) == (
            len(plan.batch),
            plan.num_tokens,
            plan.num_prefix_tokens,
        )
        assert line["flops"] == 4 * 16 * 4 * plan.rank_pairs[1]
        assert line["chosen_by_auto"] == (line["strategy"] == "all_gather")
        assert 0 < line["seconds"]["p20"] <= line["seconds"]["p50"] <= line["seconds"]["p80"]
        assert line["seconds"]["runs"] >= 3


def test_json_of_the_attention(capsys: pytest.CaptureFixture[str]) -> None:
    document = found(capsys, "attention", "--tokens", "70", "--v-head-dim", "8", *SMALL)
    assert {line["batch"] for line in document["measured"]} == set(made_batches(70))
    assert sum(line["chosen_by_auto"] for line in document["measured"]) == 3
    assert document["options"]["attention"]["v_head_dim"] == 8
    assert document["options"]["tokens"] == 70


@pytest.mark.parametrize(
    ("arguments", "cp_sizes", "requests"), [([], [4, 8, 64], 4), (["--cp", "5"], [5], 4), (["--batch", "9 x 3"], [4, 8, 64], 1)]
)
def test_json_of_the_metadata(capsys: pytest.CaptureFixture[str], arguments: list[str], cp_sizes: list[int], requests: int) -> None:
    document = found(capsys, "metadata", *arguments)
    assert [line["cp_size"] for line in document["measured"]] == cp_sizes * requests
    assert document["options"]["attention"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "0"], "--tokens 0 --seconds 2.0: both must be above 0"),
        (["--seconds", "0"], "both must be above 0"),
        (["--seconds", "nan"], "both must be above 0"),
        (["--cp", "0"], "cp_size=0; it must be an integer of at least 1"),
        (["--cp", "5000"], "--cp 5000: it can be 4,096 at most"),
        (["--batch", "8x8k"], "request 0 of the batch is '8x8k'"),
        (["--heads", "6/4"], "--heads 6 --kv-heads 4: query heads must be a multiple"),
        (["--heads", "8/4", "--kv-heads", "2"], "--heads 8/4 --kv-heads 2: give key/value heads only once"),
    ],
)
def test_bad_options_are_refused(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(["bench", "layer", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert main(["bench", "layer", *arguments, "--json"]) == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--heads", "8/x"], "argument --heads: invalid value: '8/x'; pass query heads, or query and key/value heads: 32/8"),
        (["--tokens", "5", "--batch", "6"], "argument --batch: not allowed with argument --tokens"),
    ],
)
def test_options_that_do_not_parse_are_refused(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "layer", *arguments])
    assert message in capsys.readouterr().err


def test_variants_run_in_turn() -> None:
    calls: list[str] = []
    timed = timings({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, seconds=0)
    assert calls == ["a", "b"] * 4
    assert [timing.runs for timing in timed.values()] == [3, 3]


def test_flops_of_one_request_alone() -> None:
    """n (n + 1) / 2 pairs, two products of a multiply and an add for each of the head's dimensions."""
    shape = Shape(heads=3, kv_heads=1, head_dim=16, v_head_dim=8, dtype="float32", itemsize=4)
    assert causal_flops(shape, cpattn.plan([(0, 4)], 1).rank_pairs[0]) == 10 * 2 * (16 + 8) * 3
    assert list(made_batches(64).values())[1] == [(64, 64)]
