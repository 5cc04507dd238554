"""The pages and the examples do what they say: their code runs, their commands and links exist, their tables are the library's."""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import json
import logging
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from inputs.problems import problem
from programs.example_runs import alone, together
from torch._dynamo.utils import counters

import cpattn
from cpattn.attention import auto
from cpattn.cli.main import main, parser
from cpattn.costs import corrections

ROOT = Path(__file__).parents[2]
README, CONCEPTS, CHOOSING, PERFORMANCE = (
    (ROOT / page).read_text() for page in ("README.md", "docs/concepts.md", "docs/choosing.md", "docs/performance.md")
)
PAGES = [*(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG", "SECURITY")), *sorted((ROOT / "docs").glob("*.md"))]
# A list of names, or of what has been: the others are written to be read from end to end.
WRITTEN = [page for page in PAGES if page.name not in ("api.md", "CHANGELOG.md")]
PAGE_NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
# A fenced block: its language, and what is in it.
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page: Path) -> list[tuple[str, str]]:
    return BLOCK.findall(page.read_text())


# Code.


@pytest.mark.parametrize("page", PAGES, ids=PAGE_NAMES)
def test_every_block_says_its_language(page: Path) -> None:
    # Without one a block would be run by no test.
    assert {language for language, _ in blocks(page)} <= {"python", "sh", "text", "bibtex"}


@pytest.fixture
def _logging_stays() -> Iterator[None]:
    """What a page sets up of logging would outlast it, with a stderr that is only its own."""
    root, ours = logging.getLogger(), logging.getLogger("cpattn")
    handlers, level = list(root.handlers), ours.level
    yield
    root.handlers[:] = handlers
    ours.setLevel(level)


@pytest.mark.usefixtures("_logging_stays")
@pytest.mark.parametrize("page", PAGES, ids=PAGE_NAMES)
def test_code_runs(page: Path) -> None:
    """All Python blocks of a page, one after another, as a reader would type them."""
    names: dict[str, Any] = {"__name__": "__docs__"}
    for number, code in enumerate(code for language, code in blocks(page) if language == "python"):
        exec(compile(code, f"{page.name}, Python block {number}", "exec"), names)
    if page.name == "README.md":
        assert names["everything"].shape == (134, 8, 64)


@pytest.mark.parametrize("page", PAGES, ids=PAGE_NAMES)
def test_commands_exist(page: Path) -> None:
    """Of each command line what can be found out without running it; ``cpattn`` commands that print are run."""
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in "\n".join(code for language, code in blocks(page) if language == "sh").replace("\\\n", " ").splitlines():
        words = [word for word in shlex.split(line, comments=True) if not re.match(r"[A-Z_]+=", word)]
        if not words:
            continue
        program, *arguments = words
        for argument in arguments:
            if argument.startswith(("examples/", "benchmarks/", "docs/", "tests/")) and arguments[arguments.index(argument) - 1] != "-o":
                assert (ROOT / argument).exists(), line
        if program == "make":
            assert {argument for argument in arguments if "=" not in argument} <= set(targets), line
        elif program in ("cpattn", ".venv/bin/cpattn"):
            # Pictures are made again by tests/viz; here they would be written over.
            arguments = arguments[: arguments.index("-o")] if "-o" in arguments else arguments
            assert {"demo", "bench", "env"} & set(arguments) or main(arguments) == 0, line
        elif program == "pip":
            assert all(extra in extras for listed in re.findall(r"cpattn\[(.*?)\]", line) for extra in listed.split(",")), line
        else:
            program = program.removeprefix(".venv/bin/").removeprefix(".venv-dist/tools/bin/")
            assert program in ("git", "python", "cd", "export", ".ci/run", "torchrun"), line


@pytest.mark.parametrize("page", PAGES, ids=PAGE_NAMES)
def test_printed_output_is_what_the_command_above_it_prints(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for (language, command), (after, printed) in zip(blocks(page), blocks(page)[1:], strict=False):
        if (language, after) == ("sh", "text") and command.startswith("cpattn "):
            assert main(shlex.split(command)[1:]) == 0
            assert capsys.readouterr().out.strip() == printed.strip()


# Words.


def sentences(text: str) -> Iterator[str]:
    """The sentences of a page, code in line as one word; each cell of a table and each point of a list begins a new one."""
    text = re.sub(r"^#.*$|^>.*$", "\n\n", BLOCK.sub("\n\n", text), flags=re.MULTILINE)
    text = re.sub(r"`[^`]+`", "code", re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text))
    text = re.sub(r"^\s*(?:[-*]|\d+\.) |\|", "\n\n", text, flags=re.MULTILINE)
    for paragraph in re.split(r"\n\s*\n", text):
        yield from re.split(r"(?<=[.!?])[\")*]*\s+(?=[A-Z\"(*c])", paragraph.strip())


def test_the_readme_is_read_in_five_minutes() -> None:
    assert len(README.split()) <= 1500


@pytest.mark.parametrize("page", WRITTEN, ids=[str(page.relative_to(ROOT)) for page in WRITTEN])
def test_sentences_are_short(page: Path) -> None:
    assert [sentence for sentence in sentences(page.read_text()) if len(sentence.split()) > 30] == []


def help_texts(command: argparse.ArgumentParser) -> Iterator[str]:
    """What a command and those below it say with ``--help``, examples aside."""
    yield command.description or ""
    for group in command._action_groups:
        yield group.title or ""
    for action in command._actions:
        yield action.help or ""
        if isinstance(action, argparse._SubParsersAction):
            yield from (choice.help or "" for choice in action._choices_actions)
            for below in action.choices.values():
                yield from help_texts(below)


def test_help_is_in_short_sentences() -> None:
    found = list(help_texts(parser()))
    assert len(found) > 100
    assert [sentence for text in found for sentence in sentences(text) if len(sentence.split()) > 30] == []


def test_a_long_sentence_is_found() -> None:
    long = "Word " * 30 + "word."
    page = f"One. {long} `code` is one word.\n\n| a cell | {long} |\n- {long}"
    assert [len(one.split()) for one in sentences(page) if one] == [1, 31, 4, 2, 31, 31]


# Links.


@pytest.mark.parametrize("page", PAGES, ids=PAGE_NAMES)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", page.read_text())):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", linked.read_text()), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in [slug + (f"-{slugs[:i].count(slug)}" if slugs[:i].count(slug) else "") for i, slug in enumerate(slugs)], target


def test_every_page_can_be_reached_from_the_readme() -> None:
    seen, to_visit = set(), [ROOT / "README.md"]
    while to_visit:
        page = to_visit.pop()
        seen.add(page)
        links = [(page.parent / target).resolve() for target in re.findall(r"\]\(([^)\s#]+\.md)", page.read_text())]
        to_visit += [link for link in links if link.exists() and link not in seen]
    # The one page that is there for a forge to show leads to another.
    assert set(PAGES) - {ROOT / "CONTRIBUTING.md"} <= seen


def test_the_readme_lists_every_page_of_the_docs() -> None:
    linked = {(ROOT / target).resolve() for target in re.findall(r"\]\(([^)\s#]+\.md)", README[README.index("## Where to go next") :])}
    assert set((ROOT / "docs").rglob("*.md")) <= linked


# Tables and pictures.


def table(text: str, first_header: str) -> dict[str, dict[str, str]]:
    """A Markdown table whose first column has that header: each line's cells by their column, by its first cell's code."""
    begin = text.index(f"| {first_header} |")
    lines = text[begin:].split("\n\n")[0].splitlines()
    header, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if not set(line) <= set("|- ")]
    return {row[0].split("`")[1] if row[0].startswith("`") else row[0]: dict(zip(header, row, strict=True)) for row in rows}


def test_the_picture_of_the_layout_is_the_plan_of_the_example() -> None:
    requests = json.loads((ROOT / "examples" / "batches" / "mixed.json").read_text())
    plan = cpattn.plan([(request["prefix_len"], request["extend_len"]) for request in requests], cp_size=4)
    assert plan.draw() in CONCEPTS
    assert ", ".join(map(str, plan.rank_tokens)) in CONCEPTS
    assert f"{plan.pair_imbalance:.4f}" in CONCEPTS


def test_the_backend_table_is_what_the_backends_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpattn.attention.flash_varlen.capability", lambda device: (9, 0))
    two_head_dims = problem("cuda", torch.bfloat16, head_dim=128, v_head_dim=64)
    rows = table(CHOOSING, "backend")
    assert list(rows) == list(cpattn.BACKENDS)
    short = {"float64": "fp64", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
    for name, backend in cpattn.BACKENDS.items():
        row = rows[name]
        assert row["devices"].split(",")[0] == {None: "any", "cuda": "CUDA", "cpu": "CPU"}[next(iter(backend.device_types or []), None)]
        assert set(row["dtypes"].split(", ")) == {short[str(dtype).removeprefix("torch.")] for dtype in backend.dtypes}
        # The rule for head dims may depend on the GPU; these kernels say so by refusing.
        refuses = backend.refuses(two_head_dims) if "flash" in name else None
        for column, able in (("window", backend.window), ("softcap", backend.softcap), ("Dv != D", backend.v_head_dim and not refuses)):
            assert (row[column] == "yes") == able, (name, column)
        assert row["sinks"] == ("yes" if backend.native_sinks else "yes*"), name
        assert row["partial results"].startswith("fp32" if backend.fp32_out else "half"), name


def test_the_strategy_table_names_all() -> None:
    assert list(table(CHOOSING, "strategy")) == list(cpattn.STRATEGIES)


def test_the_page_has_the_order_in_which_auto_tries_backends() -> None:
    rows = table(CHOOSING, "compute capability")
    column = next(name for name in next(iter(rows.values())) if name.startswith("backends"))
    listed = {capability.split()[0]: re.findall(r"`(\w+)`", row[column]) for capability, row in rows.items()}
    assert listed == {str(major): order for major, order in auto._GPU_ORDERS.items()} | {"none:": auto._CPU_ORDER}


def test_corrections_of_the_model_are_on_the_page() -> None:
    assert corrections.HOST == 2
    assert "Of eager calls the host's time counts twice" in CHOOSING
    assert f"rings count {corrections.EAGER_RING - 1:.0%} more" in CHOOSING
    assert re.search(rf"{corrections.EAGER:.0%} of the host's\s+time are added", CHOOSING)


def test_quotients_of_backends_are_in_the_results() -> None:
    """The least and the largest of each kind of call, of the times through cp_attention."""
    no_launch = r"^\| ([^|]*) \| (flash_attn\d) \|(?: [^|]* \|){3} ([\d.]+) \|"
    kinds = {"+ 1)": "decoding", "ring": "merging", "pass_q": "merging", "pages": "pages", "1 x 1k": "short", "64 x 512": "short"}
    with_sinks = {"long": "long with sinks", "pages": "sinks", "short": "sinks"}
    found: dict[tuple[str, str], list[float]] = {}
    for file in ("backends_gpu_fa3.md", "backends_gpu_fa4.md", "backends_gpu_merging.md"):
        for batch, backend, quotient in re.findall(no_launch, (ROOT / "benchmarks" / "results" / file).read_text(), re.MULTILINE):
            kind = "pages" if "1,920" in batch else next((kinds[word] for word in kinds if word in batch), "long")
            kind = with_sinks.get(kind, kind) if "sinks" in batch else kind
            found.setdefault((kind, f"`{backend}`"), []).append(float(quotient))
    for kind, row in table(CHOOSING, "on 9, kind of call").items():
        if kind.startswith("long, keys late"):
            assert row["`flash_attn4`"] == _quotients_of_calls_with_late_keys()
            continue
        for backend in ("`flash_attn3`", "`flash_attn4`"):
            values = found[kind.split(":")[0], backend]
            assert row[backend] == f"{min(values):.2f} to {max(values):.2f}", (kind, backend)


def _quotients_of_calls_with_late_keys() -> str:
    """Of flash_attn4, in batches that are as long."""
    batches = {("8 x (8k + 2k)", "2"), ("8 x 8k", "2"), ("1 x 32k", "2"), ("8 x 8k", "4"), ("1 x 32k", "4")}
    quotients = []
    for line in (ROOT / "benchmarks" / "results" / "late_keys.md").read_text().splitlines():
        cells = line.strip("| ").split(" | ")
        if tuple(cells[:2]) in batches:
            times = cells[2:]
            flash_attn4, _, triton = (float(time.replace(",", "")) for time in times[-3:])
            quotients.append(flash_attn4 / triton)
    assert len(quotients) == len(batches)
    return f"{min(quotients):.2f} to {max(quotients):.2f}"


def test_figures_of_late_keys_are_in_the_results() -> None:
    results = (ROOT / "benchmarks" / "results" / "late_keys.md").read_text()
    columns = {"launch alone": 0, '`"collectives"`': 3, '`"peer_memory"`, keys first': 5, '`"peer_memory"`, keys beside': 6}
    for case, row in table(PERFORMANCE, "batch, GPUs").items():
        batch, _, gpus = case.rpartition(", ")
        (line,) = (line for line in results.splitlines() if line.startswith(f"| {batch} | {gpus} |"))
        times = line.strip("| ").split(" | ")[2:]
        assert [row[name] for name in columns] == [times[i] for i in columns.values()], case


def test_figures_of_partitions_are_in_the_results() -> None:
    results = (ROOT / "benchmarks" / "results" / "partitions_2_gpus.md").read_text().partition("## Eager")[0]
    columns = {"`zigzag`": 0, "`auto`": 2, "one GPU": 3, "best peer": 4}
    for batch, row in table(CHOOSING, "batch, 2 GPUs").items():
        (line,) = (line for line in results.splitlines() if line.startswith(f"| {batch} | "))
        times = line.strip("| ").split(" | ")[1:]
        assert [row[name] for name in columns] == [times[i] for i in columns.values()], batch


def test_figures_of_a_launch_are_in_the_results() -> None:
    results = (ROOT / "benchmarks" / "results" / "attention_gpu.md").read_text()
    chosen = {name: f"{name}, one launch" for name in ("flash_attn3", "flash_attn4", "triton", "torch_flash")}
    cases = {"1 request of 128k, cp 8": "1 x 128k, cp 8", "8 requests of 8k over 8k cached, cp 4": "8 x (8k + 8k), cp 4"}
    cases |= {"64 ragged requests (about 0.9k over 4k cached), cp 4": "64 ragged, cp 4"}
    cases |= {"1 request of 32k over 96k cached, cp 8": "1 x (96k + 32k), cp 8"}
    for case, row in table(PERFORMANCE, "batch").items():
        for backend, variant in chosen.items():
            line = next(line for line in results.splitlines() if line.startswith(f"| {cases[case]} | {variant} |"))
            rate, sustained = line.strip("| ").split(" | ")[6:8]
            assert row[f"`{backend}`"] == f"{rate} ({sustained})", (case, backend)
    (decode,) = table(PERFORMANCE, "decode").values()
    for backend, variant in chosen.items():
        line = next(line for line in results.splitlines() if line.startswith(f"| 256 x (8k + 1), cp 4 | {variant} |"))
        assert decode[f"`{backend}`"] == line.strip("| ").split(" | ")[8], backend


def test_figures_of_a_layer_are_in_the_results() -> None:
    lines = (ROOT / "benchmarks" / "results" / "layer_gpu.md").read_text().splitlines()
    measured = [line.strip("| ").split(" | ") for line in lines if re.match(r"\| [\d,]+ \|", line)]

    def span(tokens: str, strategy: str, backends: str, column: int, digits: int) -> str:
        values = [float(line[column]) for line in measured if line[0] == tokens and line[3] == strategy and line[4] in backends]
        return f"{min(values):.{digits}f} to {max(values):.{digits}f}"

    text = " ".join(PERFORMANCE.split())
    both = "flash_attn4 triton"
    for page in (text, " ".join(README.split())):
        assert f"takes {span('131,072', 'all_gather', both, 8, 2)} times the launch alone with all-gather" in page
    assert f"and {span('131,072', 'ring', 'triton', 8, 2)} times with a ring on `triton`" in text
    assert f"a ring on `flash_attn4` takes {span('131,072', 'ring', 'flash_attn4', 8, 2)} times" in text
    assert f"adds {span('1,024', 'all_gather', both, 7, 0)} us to the launch as a CUDA graph with all-gather" in text
    assert f"cpattn's own Python takes {span('1,024', 'all_gather', 'triton', 11, 0)} us a call with all-gather" in text
    assert f"and {span('1,024', 'ring', 'triton', 11, 0)} us with a ring" in text


def test_figures_of_a_servers_step_are_in_the_results() -> None:
    lines = (ROOT / "benchmarks" / "results" / "serving_gpu.md").read_text().splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    measured = {tuple(line[:3]): line for line in cells}
    for step, row in table(PERFORMANCE, "step").items():
        replicated, sharded = measured[step, "replicated", "all_gather"], measured[step, "sharded", "pass_q"]
        assert row["one rank alone"] == measured[step, "-", "one rank"][4]
        assert row["replicated, `all_gather`"] == replicated[4]
        assert row["sharded, `pass_q`"] == sharded[4]
        assert row["MB of pages: replicated, sharded"] == f"{replicated[-1]}, {sharded[-1]}"


def test_figures_between_two_gpus_are_in_the_results() -> None:
    file = ROOT / "benchmarks" / "results" / "nccl_two_h100.md"
    eager, decode = (found.split("\n\n")[0] for found in file.read_text().split("| variant |")[1::2])
    measured = table("| variant |" + eager, "variant") | table("| variant |" + decode, "variant")
    section = PERFORMANCE[PERFORMANCE.index("## Between two GPUs") :]
    quoted = [table(part, "variant") for part in (section, section[section.index("| variant | ms |") :])]
    assert [len(rows) for rows in quoted] == [4, 4]
    for name, row in (item for rows in quoted for item in rows.items()):
        assert row.items() <= measured[name].items(), name


def test_figures_beside_peers_are_in_the_results() -> None:
    """Quotients are of the times themselves, as three digits of them rounded once more can be another figure."""
    results = (ROOT / "benchmarks" / "results" / "peers_2_gpus.md").read_text()
    lines = [line.strip("| ").split(" | ") for line in PERFORMANCE[PERFORMANCE.index("## Beside peers") :].splitlines()]
    quoted = {cells[0]: cells[1:] for cells in lines}
    spans = []
    for kind, first in (("as CUDA graphs", 0), ("eager", 3)):
        rows = table(results[results.index(f"## Beside peers, {kind}, us") :], "batch")
        of_peers = []
        for batch, row in rows.items():
            auto, best_fixed = (float(row[name].replace(",", "")) for name in ("auto", "best fixed"))
            peers = [row[name] for name in list(row)[list(row).index("which") + 1 : list(row).index("auto / A")]]
            of_peers.append(auto / min(float(time.replace(",", "")) for time in peers if time))
            assert quoted[batch][first : first + 3] == [row["auto"], f"{of_peers[-1]:.2f}", f"{auto / best_fixed:.2f}"], (batch, kind)
        spans.append(f"{min(of_peers):.2f} to {max(of_peers):.2f}")
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert len(rows) == 11
    assert f"eleven batches took {spans[0]} of the best peer's time" in README
    assert f"took {spans[0]} of the best one's time as CUDA graphs, and {spans[1]} eagerly" in README
    assert f"needs {spans[0]} of the best peer's time as CUDA graphs and {spans[1]} eagerly" in changelog


def test_figures_of_transports_are_in_the_results() -> None:
    lines = (ROOT / "benchmarks" / "results" / "transports_2_gpus.md").read_text().splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if re.match(r"\| \d", line)]
    measured = {tuple(line[:3]): (line[3], line[6]) for line in cells}
    section = PERFORMANCE[PERFORMANCE.index("What [carries the bytes]") :]
    for batch, row in table(section, "batch").items():
        for transport in ("no transfer", '`"peer_memory"`', '`"collectives"`'):
            graph, eager = measured[batch, "triton", transport.strip('`"')]
            assert row[transport] == f"{graph} ({eager})", (batch, transport)
    gathers = {(batch, backend) for batch, backend, _ in measured if not batch.endswith(("ring", "pass_q"))}
    spans = []
    for way in (0, 1):
        both = [[measured[batch, backend, kind][way] for kind in ("peer_memory", "collectives")] for batch, backend in gathers]
        quotients = [float(peers.replace(",", "")) / float(collectives.replace(",", "")) for peers, collectives in both]
        spans += [f"{min(quotients) - 1:.0%}", f"{max(quotients) - 1:.0%}"]
    assert spans == ["-17%", "1%", "-23%", "-1%"]
    assert "took 17% less to 1% more than NCCL as a graph, and 23% to 1% less eagerly" in section
    assert "took [17% less to 1% more]" in CHOOSING


def test_the_readme_lists_the_extras_of_the_package() -> None:
    section = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]\n")[1].split("\n[")[0]
    extras = set(re.findall(r"^(\w+) = ", section, re.MULTILINE)) - {"test", "lint", "docs"}
    begin = README.index("| extra |")
    listed = re.findall(r"`(\w+)`", " ".join(line.split("|")[1] for line in README[begin:].split("\n\n")[0].splitlines()))
    assert sorted(listed) == sorted(extras)


def test_citation_has_the_version() -> None:
    citation = (ROOT / "CITATION.cff").read_text()
    assert f'version: "{cpattn.__version__}"' in citation
    assert f"version = {{{cpattn.__version__}}}" in README


# The API page: Sphinx makes its text of docstrings, and leaves out, without a word, what has none.

DIRECTIVE = re.compile(r"^\.\. auto(\w+):: ([\w.]+)$", re.MULTILINE)


INTEGRATIONS = [f"cpattn.integrations.{name}" for name in ("transformers", "sglang", "vllm")]
MODULES = ["cpattn", "cpattn.testing", "cpattn.viz", *INTEGRATIONS]


def documented() -> dict[str, str]:
    """What the page names, and as what."""
    return {name: kind for kind, name in DIRECTIVE.findall((ROOT / "docs" / "api.md").read_text()) if kind != "module"}


@pytest.mark.parametrize("module", MODULES)
def test_the_api_page_has_every_public_name(module: str) -> None:
    if module.endswith("transformers"):
        pytest.importorskip("transformers")
    listed = [name.rpartition(".")[2] for name in documented() if name.rpartition(".")[0] == module]
    assert sorted(listed) == sorted(importlib.import_module(module).__all__)


def members(value: type) -> Iterator[tuple[str, Any]]:
    """The public methods and properties that the package defines, those of classes below it included."""
    for name in dir(value):
        member = inspect.getattr_static(value, name)
        if name in getattr(value, "__dataclass_fields__", {}):  # whose default may be a function
            continue
        member = getattr(member, "fget", None) or getattr(member, "func", None) or getattr(member, "__func__", member)
        if not name.startswith("_") and inspect.isfunction(member) and member.__module__.startswith("cpattn"):
            yield name, member


def test_everything_on_the_api_page_has_a_docstring() -> None:
    pytest.importorskip("transformers")
    kinds: dict[str, Any] = {"function": inspect.isfunction, "class": inspect.isclass, "exception": inspect.isclass}
    without = []
    for name, kind in documented().items():
        module, _, short = name.rpartition(".")
        value = getattr(importlib.import_module(module), short)
        assert kind == "data" or kinds[kind](value), name
        if kind != "data":
            without += [] if inspect.getdoc(value) else [name]
        if kind == "class":
            without += [f"{name}.{member}" for member, function in members(value) if not inspect.getdoc(function)]
    assert without == []


# Troubleshooting quotes messages; these must be the library's.


def messages() -> set[str]:
    """All strings of the library, with NUL where a value stands."""
    found = set()
    for path in (ROOT / "cpattn").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.add("".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


def has_in_order(text: str, parts: list[str]) -> bool:
    at = 0
    for part in parts:
        begin = text.find(part, at)
        if begin < 0:
            return False
        at = begin + len(part)
    return True


def test_quoted_messages_are_the_librarys() -> None:
    quoted = re.findall(r"^> `(.*)`$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(quoted) > 10
    known = messages()
    for message in quoted:
        assert any(has_in_order(one, message.split("...")) for one in known), message


def test_the_line_of_the_log_is_that_of_the_example() -> None:
    """What the model says on the page of its reasons, it says now."""
    meta = cpattn.build_metadata([(0, 700), (512, 130), (300, 1)], 4, 0, partition="auto")  # as examples/quickstart.py has them
    q, k, cached = (torch.empty(rows, heads, 64) for rows, heads in ((meta.rows, 8), (meta.rows, 2), (812, 2)))
    group = cpattn.testing.SoloCommunicator(0, 4)
    explained = cpattn.explain(q, k, k, meta, kv_cache=cpattn.PackedKV(cached, cached), group=group)
    name, _, why = explained["strategy"].partition(": ")
    call = "4 ranks, 8/2 heads of 64 in float32 on cpu with a packed cache"
    assert (
        f"[cpattn rank 0] INFO: {call}: strategy '{name}' ({why}); backend 'cpu' (chosen)" in (ROOT / "docs" / "profiling.md").read_text()
    )


# Examples.


def test_an_example_checks_itself() -> None:
    """Started as it says; others are started in less time."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", "examples/quickstart.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("relative RMSE") == 3


def test_the_custom_model_checks_itself() -> None:
    for exited, printed in together("custom_model", 2):
        assert exited == 0
        assert "relative RMSE of the logits" in printed


def test_the_custom_model_runs_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert alone("custom_model") == 0
    assert re.match(r"rank 0 of 1 on (cpu|cuda:0): 128 of 128 prompt tokens here", capsys.readouterr().out)


def test_the_custom_model_compiles_to_one_graph(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """By a backend that needs no C++ compiler, and much less time."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    assert alone("custom_model", "--compile") == 0
    assert "relative RMSE of the logits" in capsys.readouterr().out
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("example", ["quickstart", "hugging_face"])
def test_an_example_says_how_to_start_it(example: str) -> None:
    if example == "hugging_face":
        pytest.importorskip("transformers")
    assert alone(example) == f"start this with: torchrun --nproc-per-node 4 examples/{example}.py"


@pytest.mark.parametrize("example", ["hugging_face", "hf_generate", "perplexity", "mini_engine"])
def test_an_example_says_what_to_install(example: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert alone(example) == "this needs transformers: pip install 'cpattn[transformers]'"


def test_the_custom_model_refuses_what_it_does_not_take(capsys: pytest.CaptureFixture[str]) -> None:
    assert alone("custom_model", "--cp", "3") == 1
    assert capsys.readouterr().err.strip().endswith("start this with: torchrun --nproc-per-node 4 examples/custom_model.py")
