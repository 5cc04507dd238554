"""The logger ``cpattn``: what ``auto`` chose and why, once for each kind of call, and nothing where nobody listens."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from inputs.cases import AttentionCase
from inputs.problems import problem

import cpattn
from cpattn import log
from cpattn.call import find, log_choice
from cpattn.call.arguments import Arguments
from cpattn.call.choose import choose
from cpattn.call.explain_choice import explain_strategy
from cpattn.exchange.auto import AUTO_GATHER_LIMIT, candidate_strategies
from cpattn.testing import run_loopback

ROOT = Path(__file__).parents[2]
CASE = AttentionCase([(0, 40), (5, 3)])


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """No kind of call has a line yet."""
    log_choice._told.clear()
    yield
    log_choice._told.clear()


def lines(caplog: pytest.LogCaptureFixture, level: int = logging.INFO) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "cpattn" and record.levelno == level]


def call(cp_size: int = 1, **options: Any) -> None:
    plan = CASE.plan(cp_size)

    def program(transport: cpattn.Transport) -> None:
        meta = plan.metadata(transport.rank)
        q, k, v = (cpattn.shard(x, meta) for x in (CASE.q, CASE.k, CASE.v))
        for _ in range(2):
            cpattn.cp_attention(q, k, v, meta, group=transport, kv_cache=CASE.prefix, **options)

    run_loopback(program, cp_size)


def test_a_kind_of_call_has_one_line_on_all_ranks_that_are_threads(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "cpattn"):
        call(3)
        call(3)
    (line,) = lines(caplog)
    assert re.fullmatch(
        r"3 ranks, 4/2 heads of 16 in float32 on cpu with a packed cache: strategy 'all_gather' \(chosen, all_gather with cpu estimated "
        r"[\d,]+ us, ring with cpu at least [\d,]+ us: eagerly over collectives on h100-nvlink, as this machine is unknown\); "
        r"backend 'cpu' \(chosen\)",
        line,
    )


def test_what_was_passed_over_is_named_in_the_words_of_explain(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "cpattn"):
        call(window=4)
    meta = CASE.plan(1).metadata(0)
    explained = cpattn.explain(CASE.q, CASE.k, CASE.v, meta, kv_cache=CASE.prefix, window=4)
    (line,) = lines(caplog)
    assert f"backend 'reference' ({explained['reference']}), before it 'cpu' ({explained['cpu']})" in line
    assert "1 rank, 4/2 heads of 16 in float32 on cpu with window 4, a packed cache: " in line


def test_only_what_auto_chose_is_explained(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "cpattn"):
        call(strategy="ring")
        call(backend="reference")
        call(strategy="ring", backend="reference")
    (first, second) = lines(caplog)
    assert "strategy 'ring' (asked for); backend 'cpu' (chosen)" in first
    assert re.search(r"strategy 'all_gather' \(chosen, .*\); backend 'reference' \(asked for\)", second)


def test_attend_over_pages_has_no_strategy(caplog: pytest.LogCaptureFixture) -> None:
    meta = cpattn.build_metadata([(2, 1)], cp_size=1, cp_rank=0)
    pages = torch.randn(4, 16, 2, 8)
    cache = cpattn.PagedKV(pages, pages, torch.tensor([[2]], dtype=torch.int32))
    with caplog.at_level(logging.INFO, "cpattn"):
        cpattn.attend(torch.randn(1, 4, 8), cache, meta)
    (line,) = lines(caplog)
    assert re.match(
        r"1 rank, 4/2 heads of 8 in float32 on cpu with a paged cache: backend 'cpu' \(chosen, reads a packed copy of the pages of 16\)$",
        line,
    )


def test_debug_has_a_line_for_each_call_that_is_prepared(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "cpattn"):
        call(2, strategy="ring", backend="cpu")
        call(2, strategy="ring", backend="cpu")
    found = lines(caplog, logging.DEBUG)
    assert len(found) == 4
    assert all(re.match(r"prepared ring on cpu for CPMetadata\(rank \d of 2: .*: 3 hops, 5.5 KiB sent in a call$", line) for line in found)


def test_nothing_is_worked_out_where_nobody_listens(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def never(*_: object) -> dict[str, str]:
        raise AssertionError("nobody listens")

    monkeypatch.setattr(log_choice, "explain_backend", never)
    monkeypatch.setattr(log_choice, "explain_strategy", never)
    with caplog.at_level(logging.WARNING, "cpattn"):
        call()
    assert not log_choice._told


def test_a_call_that_is_found_again_logs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[object] = []
    monkeypatch.setattr(find, "log_choice", lambda *arguments: prepared.append(arguments))
    call(2)
    assert len(prepared) == 2  # of two ranks, and of the two calls of each


@pytest.mark.parametrize("rows", [16, 2**21])
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("decodes", [False, True])
def test_strategies_are_explained_the_chosen_one_first(rows: int, sharded: bool, decodes: bool) -> None:
    batch = [(64, 1)] * (4 * rows if decodes and rows == 16 else 4) if decodes else [(64, 4 * rows)]
    plan = cpattn.plan(batch, 4, prefix_shards=[[16] * 4] * len(batch) if sharded else None)
    asked = problem("cpu", torch.bfloat16, rows=rows, cache="paged", page_size=16)
    (first, *others), *_ = candidate_strategies("auto", asked, plan)
    x = torch.empty(0)
    choice = choose(Arguments(x, x, x), asked, plan)
    explained = explain_strategy(choice, plan)
    assert set(explained) == set(cpattn.STRATEGIES)
    assert choice.strategy in (first, *others)
    assert next(iter(explained)) == choice.strategy.name
    assert (explained["ring"] == "able, but not taken for such a batch") == (sharded and decodes)
    if others:
        named = rf"chosen, {choice.strategy.name} with cpu estimated [\d,]+ us, \w+ with cpu (estimated|at least) "
        assert re.match(named, explained[choice.strategy.name])
    else:
        gathered = 4 * rows * asked.key_bytes
        assert (gathered <= AUTO_GATHER_LIMIT) == ("within" in explained[first.name])
    *earlier, (*_, last) = candidate_strategies("auto", asked, plan)
    later = explain_strategy(choice._replace(strategy=last, decision=replace(choice.decision, ways=())), plan)
    assert all(later[one.name] == "no backend can serve it" for group in earlier for one in group)


PROGRAM = """
import logging, torch, cpattn
assert "logging" not in vars(cpattn)
logging.basicConfig(level=logging.DEBUG)
meta = cpattn.build_metadata([(0, 4)], cp_size=1, cp_rank=0)
x = torch.randn(4, 2, 8)
for _ in range(2):
    cpattn.cp_attention(x, x, x, meta)
"""


def test_the_environment_shows_it_on_stderr_with_the_rank() -> None:
    environment = os.environ | {"CPATTN_LOG": " Debug ", "RANK": "3"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    info, debug = done.stderr.splitlines()
    assert info.startswith("[cpattn rank 3] INFO: 1 rank, 2/2 heads of 8 in float32 on cpu: strategy 'all_gather' (chosen, ")
    assert debug.startswith("[cpattn rank 3] DEBUG: prepared all_gather on cpu for CPMetadata(")


@pytest.fixture
def set_up_anew() -> Iterator[logging.Logger]:
    """The logger, as a process finds it that has not logged yet."""
    found = logging.getLogger("cpattn")
    handlers, level, propagate = list(found.handlers), found.level, found.propagate
    found.handlers.clear()
    log._set_up.cache_clear()
    yield found
    found.handlers[:], found.propagate = handlers, propagate
    found.setLevel(level)
    log._set_up.cache_clear()


def test_a_line_without_a_rank(set_up_anew: logging.Logger, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CPATTN_LOG", "info")
    monkeypatch.delenv("RANK", raising=False)
    call()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("[cpattn] INFO: 1 rank, ")
    assert not set_up_anew.propagate


def test_a_value_that_is_not_known_is_named_once(
    set_up_anew: logging.Logger, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CPATTN_LOG", "loud")
    message = "CPATTN_LOG=loud is unknown, and nothing is logged for it: set it to info or debug, or unset it"
    with pytest.warns(UserWarning, match=message) as caught:
        call()
    assert len(caught) == 1
    assert "[cpattn" not in capsys.readouterr().err
    assert not set_up_anew.handlers


@pytest.mark.parametrize(("asked", "where"), [(None, "nowhere"), (None, "root"), ("info", "root")])
def test_a_warning_is_seen_once_whoever_has_set_up_logging(
    asked: str | None, where: str, set_up_anew: logging.Logger, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On stderr where nobody has, which is what Python does for a logger without any handler; a line below a warning is not."""
    monkeypatch.delenv("CPATTN_LOG", raising=False)
    if asked is not None:
        monkeypatch.setenv("CPATTN_LOG", asked)
    monkeypatch.setattr(logging.root, "handlers", [logging.StreamHandler()] if where == "root" else [])
    found = log.logger()
    found.info("a line")
    found.warning("a warning")
    said = capsys.readouterr().err
    assert said.count("a warning") == 1
    assert ("a line" in said) == (asked is not None)
