"""``cpattn plan``: its numbers are those of the plan, and its bytes those that a rank really sends."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import cpattn
from cpattn import Communicator
from cpattn.cli.main import main
from cpattn.cli.traffic import Shape, in_words, strategy_bytes
from cpattn.metadata.needed_keys import lacking_rows
from cpattn.testing import run_loopback

BATCH = [(0, 60), (33, 5), (4, 0)]
TEXT = "0+60, 33+5, 4+0"


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["plan", *arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("strategy", cpattn.STRATEGIES)
@pytest.mark.parametrize("v_head_dim", [8, 4])
def test_bytes_are_those_that_are_sent(strategy: str, v_head_dim: int) -> None:
    plan = cpattn.plan(BATCH, 3, pad_to=4)
    shape = Shape(heads=4, kv_heads=2, head_dim=8, v_head_dim=v_head_dim, dtype="bfloat16", itemsize=2)

    def program(communicator: Communicator) -> int:
        meta = plan.metadata(communicator.rank)
        q, k, v = (torch.zeros(plan.rows, heads, dim, dtype=torch.bfloat16) for heads, dim in ((4, 8), (2, 8), (2, v_head_dim)))
        prefix = (torch.zeros(plan.num_prefix_tokens, 2, dim, dtype=torch.bfloat16) for dim in (8, v_head_dim))
        cpattn.cp_attention(q, k, v, meta, group=communicator, kv_cache=cpattn.PackedKV(*prefix), strategy=strategy)
        return communicator.bytes_sent

    assert run_loopback(program, 3) == [strategy_bytes(plan, shape)[strategy]] * 3


def test_every_strategy_says_what_travels() -> None:
    assert all(strategy.travels for strategy in cpattn.STRATEGIES.values())


def test_bytes_of_pass_q() -> None:
    """Queries of 10 rows to 2 ranks, and for each of those rows an fp32 output and an LSE a head back."""
    shape = Shape(heads=4, kv_heads=1, head_dim=8, v_head_dim=16, dtype="bfloat16", itemsize=2)
    assert strategy_bytes(cpattn.plan([(0, 30)], 3), shape)["pass_q"] == 2 * 10 * 4 * (8 * 2 + (16 + 1) * 4)


def test_nothing_is_sent_by_one_rank_or_without_rows() -> None:
    shape = Shape(4, 1, 8, 8, "float32", 4)
    for plan in (cpattn.plan([(0, 30)], 1), cpattn.plan([(30, 0)], 4)):
        assert set(strategy_bytes(plan, shape).values()) == {0}


def test_sizes_in_words() -> None:
    assert [in_words(size) for size in (0, 1023, 1024, 2**20 - 1, 5 * 2**40)] == ["0 B", "1023 B", "1.0 KiB", "1024.0 KiB", "5.0 TiB"]


def test_tables(capsys: pytest.CaptureFixture[str]) -> None:
    plan = cpattn.plan(BATCH, 4, pad_to=8)
    text = output(capsys, "--batch", TEXT, "--cp", "4", "--pad-to", "8", "--heads", "8", "--kv-heads", "1", "--dtype", "float32")
    for line in [*plan.draw().splitlines(), f"imbalance (fullest rank over the mean): tokens {plan.token_imbalance:.4f}"]:
        assert line in text
    for rank in range(4):
        row = next(line for line in text.splitlines() if re.match(rf"{rank} +\d", line))
        assert row.split()[1:4] == [f"{plan.rank_tokens[rank]:,}", f"{plan.rows - plan.rank_tokens[rank]}", f"{plan.rank_pairs[rank]:,}"]
    assert "8 query and 1 key/value heads of 128, float32" in text
    # What the rank sends that sends the most, of rows that others see.
    most = lacking_rows(plan, None).sent.max()
    assert re.search(rf"ring +keys and values +{most * 1 * 256 * 4:,} ", text)
    assert "keys of an all_gather: a rank receives those that its queries see, at most 48.0 KiB of 72.0 KiB" in text
    assert "partition: zigzag; 'auto' takes whole\n(a layer's attention on h100-nvlink is estimated at " in text
    assert max(map(len, text.splitlines())) <= 100


def test_a_latent(capsys: pytest.CaptureFixture[str]) -> None:
    mla = "--heads", "128", "--head-dim", "192", "--v-head-dim", "128", "--latent-dim", "576"
    text = output(capsys, "--batch", "16k", "--cp", "2", *mla)
    assert "128 heads of 192 (v: 128) that a latent of 576 is expanded to, bfloat16" in text
    assert re.search(rf"all_gather +keys and values +{8192 * 576 * 2:,} ", text)
    assert "ulysses" not in text
    found = json.loads(output(capsys, "--batch", "16k", "--cp", "2", *mla, "--machine", "h100-nvlink", "--json"))
    assert found["attention"]["latent_dim"] == 576
    assert found["estimates"][0]["strategy"] == "all_gather"
    assert main(["plan", "--batch", "16k", "--heads", "8/2", "--latent-dim", "576"]) == 2
    assert "--latent-dim 576 with 2 key/value heads for 8 query heads: it is" in capsys.readouterr().err


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    plan = cpattn.plan(BATCH, 4, partition="contiguous", remainder="first")
    found = json.loads(output(capsys, "--batch", TEXT, "--cp", "4", "--partition", "contiguous", "--remainder", "first", "--json"))
    assert [(request["prefix_len"], request["extend_len"]) for request in found["batch"]] == BATCH
    assert [rank["pairs"] for rank in found["ranks"]] == list(plan.rank_pairs)
    assert [rank["tokens"] + rank["padding"] for rank in found["ranks"]] == [plan.rows] * 4
    assert [tuple(chunk.values()) for chunk in found["chunks"]] == list(plan.chunks)
    assert found["pair_imbalance"] == plan.pair_imbalance
    assert found["fingerprint"] == plan.fingerprint
    assert found["strategies"]["ring"] == {"bytes_sent_per_rank": 3 * plan.rows * 8 * 256 * 2}


def test_auto_is_shown_as_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(output(capsys, "--batch", "900 x 20", "--cp", "4", "--partition", "auto", "--json"))
    assert found["partition"] == "whole"
    assert found["needed_bytes_per_rank"] == 0
    assert found["rest_bytes_per_rank"] == (18_000 - min(rank["tokens"] for rank in found["ranks"])) * 2 * 8 * 128 * 2
    short = "--batch", "300", "--cp", "8", "--token-cost", "1000", "--json"
    assert json.loads(output(capsys, *short, "--partition", "auto"))["partition"] == "uncut"
    assert "'auto' takes whole\n" in output(capsys, "--batch", "900 x 20", "--cp", "4", "--compare")
    for further in ([], ["--compare"]):
        text = output(capsys, *short[:-1], "--partition", "auto", *further)
        assert "'auto' takes uncut\n(a layer's attention, with token_cost=1000 for the rest of it, on h100-nvlink" in text


def test_cached_keys_that_lie_on_other_ranks_are_needed(capsys: pytest.CaptureFixture[str]) -> None:
    """Beside new ones, of which requests that are whole need none."""
    options = "--batch", "100+8 x 4", "--cp", "4", "--sharded", "--partition", "whole", "--heads", "4/2", "--dtype", "float16"
    found = json.loads(output(capsys, *options, "--json"))
    assert found["needed_bytes_per_rank"] == found["strategies"]["ring"]["bytes_sent_per_rank"] == 75 * 2 * 2 * 128 * 2
    assert found["rest_bytes_per_rank"] == 0
    assert re.search(r"keys needed of others( +\d[^ ]* \w+){4} +75.0 KiB +75.0 KiB", output(capsys, *options, "--compare"))


def test_one_rank_compares_no_partitions_by_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert "()" not in output(capsys, "--batch", "300 x 4", "--cp", "1", "--compare")


def test_compare(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "--batch", TEXT, "--cp", "2", "--compare")
    lines = {line[:20].strip(): line.split()[-6:] for line in text.splitlines()}
    plans = [cpattn.plan(BATCH, 2, partition=p, remainder=r) for p in ("zigzag", "contiguous") for r in ("balanced", "first")]
    plans += [cpattn.plan(BATCH, 2, partition=partition) for partition in ("whole", "uncut")]
    assert lines["partition"] == [plan.partition for plan in plans]
    assert lines["remainder"] == ["balanced", "first", "balanced", "first", "none", "none"]
    assert lines["pairs, max / mean"] == [f"{plan.pair_imbalance:.4f}" for plan in plans]
    assert re.search(r"keys needed of others( +\d[^ ]* \w+){6}", text)
    assert re.search(r"the other keys( +\d[^ ]* \w+){6}", text)
    assert lines["pairs of rank 1"] == [f"{plan.rank_pairs[1]:,}" for plan in plans]
    found = json.loads(output(capsys, "--batch", TEXT, "--cp", "2", "--compare", "--json"))
    assert [other["fingerprint"] for other in found["plans"]] == [plan.fingerprint for plan in plans]


@pytest.mark.parametrize("batch", ["0+0", "5+0, 0+1", ",".join(["9+9"] * 40)])
def test_ugly_batches(capsys: pytest.CaptureFixture[str], batch: str) -> None:
    for extra in ([], ["--compare"], ["--json"]):
        assert output(capsys, "--batch", batch, "--cp", "5", *extra)


def test_draw(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "plan.png"
    assert f"drawn to {picture}" in output(capsys, "--batch", TEXT, "--cp", "2", "--draw", str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_estimates_are_those_of_the_library(capsys: pytest.CaptureFixture[str]) -> None:
    plan = cpattn.plan(BATCH, 3, pad_to=4)
    problem = cpattn.Problem(torch.device("cpu"), torch.float16, plan.rows, 8, 2, 64, 64, cache="packed")
    best, *others = cpattn.estimate(plan, problem, "h200-nvlink")
    options = ["--batch", TEXT, "--cp", "3", "--pad-to", "4", "--heads", "8/2", "--head-dim", "64", "--dtype", "float16"]
    printed = output(capsys, *options, "--machine", "h200-nvlink")
    assert "what one attention call would cost on h200-nvlink, in us, the fastest first" in printed
    first = next(line for line in printed.splitlines() if line.startswith(best.strategy))
    assert first.split()[:5] == [best.strategy, best.transport, str(best.overlap), best.backend, f"{best.graph * 1e6:.1f}"]
    assert max(map(len, printed.splitlines())) <= 100
    in_json = json.loads(output(capsys, *options, "--machine", "h200-nvlink", "--json"))
    assert in_json["machine"] == "h200-nvlink"
    assert in_json["estimates"][0] == asdict(best) | {"graph": best.graph, "eager": best.eager}
    assert len(in_json["estimates"]) == 1 + len(others)
    compared = output(capsys, *options, "--machine", "h200-nvlink", "--compare")
    (line,) = (line for line in compared.splitlines() if line.startswith("us on h200-nvlink"))
    assert line.split()[3] == f"{best.graph * 1e6:,.1f}"
    assert "machine" not in json.loads(output(capsys, *options, "--json"))


@pytest.mark.parametrize(
    ("machine", "cp_size", "sources"),
    [
        ("h200-nvlink", 1, "GPUs: measured"),
        ("h200-nvlink", 2, "GPUs: measured; links: measured between 2 ranks"),
        ("h100-nvlink", 8, "GPUs: measured; links: measured between 2 ranks, taken as the same between 8"),
        ("h100-nvlink", 16, "GPUs: measured; links: from data sheets"),
        ("h100-infiniband", 2, "GPUs: measured; links: from data sheets"),
        ("a100-nvlink", 2, "GPUs: from data sheets; links: from data sheets"),
    ],
)
def test_estimates_say_where_constants_are_from(capsys: pytest.CaptureFixture[str], machine: str, cp_size: int, sources: str) -> None:
    printed = output(capsys, "--batch", "8k", "--cp", str(cp_size), "--machine", machine)
    assert sources in printed.splitlines()


def test_estimates_have_no_peers_across_hosts(capsys: pytest.CaptureFixture[str]) -> None:
    printed = output(capsys, "--batch", "8k", "--cp", "16", "--machine", "a100-nvlink")
    assert "flash_attn2" in printed
    assert "peer_memory" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0+1", "--cp", "5000"], "--cp 5000: it can be 4,096 at most"),
        (["--batch", "0+1", "--cp", "2", "--partition", "whole", "--remainder", "first"], "remainder='first' beside partition='whole'"),
        (["--batch", "0+1", "--cp", "0"], "cp_size=0; it must be an integer of at least 1"),
        (["--batch", "0+1", "--cp", "2", "--heads", "6", "--kv-heads", "4"], "query heads must be a multiple"),
        (["--batch", "0+1", "--cp", "2", "--v-head-dim", "0"], "--v-head-dim 0: it must be at least 1"),
        (["--batch", "0+99999999999", "--cp", "2"], "the limit is"),
        (["--batch", "0+1", "--cp", "9" * 4000], "9...: it can be 4,096 at most"),
        (["--batch", "0+1", "--cp", "2", "--pad-to", "9" * 4000], "9...; the limit is 2147483647"),
        (["--batch", "0+1", "--cp", "2", "--head-dim", "9" * 4000], "9...: it can be 1,048,576 at most"),
        (["--batch", "0+1", "--cp", "2", "--heads", "9" * 4000], "9...: it can be 1,048,576 at most"),
        (["--batch", "0+1", "--cp", "2", "--machine", "h100-nvlink", "--dtype", "float32"], "estimates are for torch.bfloat16 and"),
        (["--batch", "0+1", "--cp", "2", "--draw", "plan.bmp"], "cannot draw to plan.bmp: a picture's name ends in .png, .svg or .pdf"),
        (["--batch", "0+1", "--cp", "2", "--draw", "/no/such/folder/plan.png"], "cannot write /no/such/folder/plan.png"),
    ],
)
def test_errors_are_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(["plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("cpattn plan: ")
    assert message in error
    assert error.count("\n") == 1
