"""A plan as text: the numbers are right, nothing is missing, and it fits a terminal."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs.strategies import Batch, any_plan_options, batches, cp_sizes, named_batches

import cpattn
from cpattn import Plan
from cpattn.metadata.draw import text_table

PLAN = cpattn.plan([(0, 10), (4, 1), (5, 0), (0, 0)], 2, pad_to=4)


def parse(picture: str) -> list[tuple[str, int]]:
    """For each request: the marks between the bars, and how many tokens one of them stands for."""
    lines = [re.fullmatch(r"request +(\d+): (\d+) \+ (\d+) +\|(.*)\|(?: x(\d+))?", line) for line in picture.splitlines()[1:]]
    assert all(lines)
    assert [int(line[1]) for line in lines if line] == list(range(len(lines)))
    return [(line[4], int(line[5] or 1)) for line in lines if line]


def owners_of(plan: Plan) -> list[str]:
    """For each request: the mark of every token, at full length."""
    owners = ["." * request.prefix_len for request in plan.batch]
    for request, _, length, rank in plan.chunks:
        owners[request] += str(rank) * length
    return owners


class TestDraw:
    def test_a_small_plan(self) -> None:
        legend, *requests = PLAN.draw().splitlines()
        assert ". cached token" in legend
        assert len(legend) <= 80
        assert "rank" in legend
        assert requests == [
            "request 0: 0 + 10 |0001111100|",
            "request 1: 4 + 1  |....0|",
            "request 2: 5 + 0  |.....|",
            "request 3: 0 + 0  ||",
        ]

    def test_no_requests(self) -> None:
        assert cpattn.plan([], 3).draw() == "(no requests)"

    @given(batches(max_prefix=30, max_extend=40), any_plan_options())
    def test_token_by_token(self, batch: Batch, options: dict[str, Any]) -> None:
        """With a mark for each token the picture is the plan."""
        plan = cpattn.plan(batch, **options)
        assert not batch or parse(plan.draw(width=70)) == [(owners, 1) for owners in owners_of(plan)]

    @given(batches(max_prefix=1000, max_extend=300), any_plan_options(), st.integers(-1, 120))
    @settings(deadline=None)
    def test_any_plan_at_any_width(self, batch: Batch, options: dict[str, Any], width: int) -> None:
        plan = cpattn.plan(batch, **options)
        if not batch:
            return
        for (line, scale), owners in zip(parse(plan.draw(width)), owners_of(plan), strict=True):
            assert scale == max(1, -(-len(owners) // max(1, width)))
            spans = [owners[at : at + scale] for at in range(0, len(owners), scale)]
            assert len(line) == len(spans) <= max(1, width)
            for mark, span in zip(line, spans, strict=True):
                # Of the new tokens the most belong to the rank shown; a dot has none beside it.
                new = span.replace(".", "")
                assert mark == "." if not new else new.count(mark) == max(map(new.count, new))

    @pytest.mark.parametrize("batch", named_batches())
    @pytest.mark.parametrize("cp_size", [1, 3, 8])
    def test_lines_fit_a_terminal(self, batch: Batch, cp_size: int) -> None:
        picture = cpattn.plan(batch, cp_size).draw()
        assert max(map(len, picture.splitlines())) <= 100
        assert not any(line != line.rstrip() for line in picture.splitlines())

    def test_long_contexts_fit_a_terminal_too(self) -> None:
        picture = cpattn.plan([(1_000_000, 131_072), (0, 1)] * 8, 8).draw()
        assert max(map(len, picture.splitlines())) <= 100

    def test_bars_are_aligned(self) -> None:
        picture = cpattn.plan([(0, 10), (640, 1)] * 6, 2).draw()
        assert len({line.index("|") for line in picture.splitlines()[1:]}) == 1

    @given(cp_sizes, st.sampled_from(["zigzag", "contiguous", "whole"]))
    def test_all_ranks_are_shown(self, cp_size: int, partition: str) -> None:
        picture = cpattn.plan([(0, 48 * cp_size)], cp_size, partition=partition).draw(width=48)
        assert set(parse(picture)[0][0]) == set(map(str, range(cp_size)))

    def test_ranks_beyond_nine_are_letters(self) -> None:
        assert parse(cpattn.plan([(0, 12)], 12, partition="contiguous").draw()) == [("0123456789ab", 1)]

    def test_a_scale_for_each_request(self) -> None:
        """One new token in a long context stays in sight."""
        plan = cpattn.plan([(4, 8), (2, 1), (11, 1)], 2, partition="contiguous")
        assert parse(plan.draw(width=3)) == [(".01", 4), ("..0", 1), ("..1", 4)]

    def test_equal_requests_share_a_line(self) -> None:
        _, *lines = cpattn.plan([(9, 1)] * 255 + [(0, 4), (9, 1)], 4, partition="contiguous").draw().splitlines()
        assert lines == [
            *(f"64 requests: 9 + 1 |.........{rank}|" for rank in range(4)),
            "request 255: 0 + 4 |0123|",
        ]

    @given(batches(max_requests=80), any_plan_options())
    @settings(deadline=None)
    def test_a_long_batch_is_drawn_in_few_lines_that_leave_nothing_out_unsaid(self, batch: Batch, options: dict[str, Any]) -> None:
        plan = cpattn.plan(batch, **options)
        lines = plan.draw(width=200).splitlines()[1:]
        assert len(lines) <= 25
        more = re.fullmatch(r"and ([\d,]+) more", lines[-1]) if lines else None
        drawn: Counter[tuple[str, str, str]] = Counter()
        for line in lines[:-1] if more else lines:
            fields = re.fullmatch(r"(?:request +\d+|([\d,]+) requests): (\d+) \+ (\d+) +\|(.*)\|", line)
            assert fields, line
            drawn[fields[2], fields[3], fields[4]] += int((fields[1] or "1").replace(",", ""))
        assert drawn.total() + int(more[1] if more else 0) == len(batch)
        there = Counter((str(prefix), str(extend), owners) for (prefix, extend), owners in zip(plan.batch, owners_of(plan), strict=True))
        assert drawn <= there

    def test_of_a_long_batch_those_with_the_most_work_are_drawn(self) -> None:
        lines = cpattn.plan([(0, 1 + number) for number in range(60)], 3).draw().splitlines()
        assert [re.split(" +|:", line)[1] for line in lines[1:-1]] == [str(number) for number in range(36, 60)]
        assert lines[-1] == "and 36 more"

    def test_the_legend_says_where_marks_come_again(self) -> None:
        assert "rank 62 has that of rank 0" in cpattn.plan([(0, 70)], 63).draw()
        assert "rank 62" not in cpattn.plan([(0, 70)], 62).draw()


class TestSummary:
    def test_a_small_plan(self) -> None:
        """11 new tokens; rank 0 has tokens 0 1 2 8 9 of request 0 and the one of request 1, at position 4."""
        assert PLAN.rank_pairs == (1 + 2 + 3 + 9 + 10 + 5, 4 + 5 + 6 + 7 + 8)
        assert PLAN.summary().splitlines() == [
            "4 requests: 11 new tokens over 9 cached ones",
            "2 ranks, zigzag partition, balanced remainder, 8 rows a rank (a multiple of 4)",
            "",
            "rank  tokens  padding  query-key pairs   share",
            "----  ------  -------  ---------------  ------",
            "0          6        2               30  50.00%",
            "1          5        3               30  50.00%",
            "all       11        5               60",
            "",
            "imbalance (fullest rank over the mean): tokens 1.0909, pairs 1.0000",
        ]

    @given(batches(max_prefix=3000, max_extend=3000), any_plan_options())
    def test_numbers_are_those_of_the_plan(self, batch: Batch, options: dict[str, Any]) -> None:
        plan = cpattn.plan(batch, **options)
        text = plan.summary().replace(",", "")
        table = {line.split()[0]: line.split()[1:] for line in text.splitlines()[5:-2]}
        assert list(table) == [*map(str, range(plan.cp_size)), "all"]
        for rank in range(plan.cp_size):
            tokens, padding, pairs, share = table[str(rank)]
            assert (int(tokens), int(pairs)) == (plan.rank_tokens[rank], plan.rank_pairs[rank])
            assert int(tokens) + int(padding) == plan.rows
            if any(plan.rank_pairs):
                assert float(share.rstrip("%")) == pytest.approx(100 * plan.rank_pairs[rank] / sum(plan.rank_pairs), abs=0.0051)
            else:
                assert share == "-"
        assert [int(cell) for cell in table["all"]] == [plan.num_tokens, plan.cp_size * plan.rows - plan.num_tokens, sum(plan.rank_pairs)]
        assert f"tokens {plan.token_imbalance:.4f} pairs {plan.pair_imbalance:.4f}" in text
        remainder = plan.remainder if plan.cuts_alike else ""
        for word in (str(plan.partition), remainder, f"{plan.rows} row", f"multiple of {plan.pad_to}", f"{len(batch)} request"):
            assert word in text

    @pytest.mark.parametrize("batch", [*named_batches(), pytest.param([(1_000_000, 131_072)] * 64, id="long-contexts")])
    def test_lines_fit_a_terminal(self, batch: Batch) -> None:
        assert max(map(len, cpattn.plan(batch, 8).summary().splitlines())) <= 100


def test_text_table() -> None:
    assert text_table(["name", "n"], [["a", "1"], ["longer", "1,000"]]).splitlines() == [
        "name        n",
        "------  -----",
        "a           1",
        "longer  1,000",
    ]


def test_text_table_with_more_columns_to_the_left() -> None:
    assert text_table(["n", "name"], [["1", "a"], ["10", "b"]], left=(1,)).splitlines() == [" n  name", "--  ----", " 1  a", "10  b"]
