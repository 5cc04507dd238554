"""What a notebook shows of a plan and of metadata: well-formed, bounded in size, escaped, and with the plan's own numbers."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given, settings
from inputs.own_partitions import OwnPartition
from inputs.strategies import Batch, any_plan_options, batches

import cpattn
from cpattn.metadata.batch import IntArray
from cpattn.metadata.rank_colors import PREFIX, RANK_COLORS

BATCH = [(0, 1531), (2048, 700), (0, 7), (997, 1), (512, 0), (0, 1)]
SVG = "{http://www.w3.org/2000/svg}"


def table(html: str) -> dict[str, str]:
    """Its lines; what is not well-formed raises."""
    rows = ElementTree.fromstring(html).iter("tr")
    return {str(row[0].text): str(row[1].text) for row in rows}


def bars(html: str) -> list[list[tuple[str, float, bool]]]:
    """Of each request its pieces: colour, width, whether it is pale."""
    lines: dict[str, list[tuple[str, float, bool]]] = {}
    for rect in ElementTree.fromstring(html).iter(f"{SVG}rect"):
        lines.setdefault(rect.attrib["y"], []).append((rect.attrib["fill"], float(rect.attrib["width"]), "opacity" in rect.attrib))
    return list(lines.values())


def test_the_numbers_are_the_plans() -> None:
    plan = cpattn.plan(BATCH, 4, pad_to=8)
    assert table(plan._repr_html_()) == {
        "requests": f"6: {plan.num_tokens:,} new tokens over {plan.num_prefix_tokens:,} cached ones",
        "ranks": "4: zigzag partition, balanced remainder",
        "tokens a rank": f"560, in {plan.rows} rows",
        "query-key pairs a rank": f"{min(plan.rank_pairs):,} to {max(plan.rank_pairs):,}",
        "fullest rank over the mean": f"tokens {plan.token_imbalance:.4f}, pairs {plan.pair_imbalance:.4f}",
    }


def test_bars_are_in_the_colours_of_ranks() -> None:
    plan = cpattn.plan(BATCH, 2)
    found = bars(plan._repr_html_())
    assert [[color for color, _, _ in bar] for bar in found] == [
        [RANK_COLORS[0], RANK_COLORS[1], RANK_COLORS[0]],
        [PREFIX, RANK_COLORS[0], RANK_COLORS[1], RANK_COLORS[0]],
        [RANK_COLORS[0], RANK_COLORS[1], RANK_COLORS[0]],
        # One token among a thousand is seen.
        [PREFIX, RANK_COLORS[plan.chunks[-2].rank]],
        [PREFIX],
        [RANK_COLORS[plan.chunks[-1].rank]],
    ]
    assert [sum(width for _, width, _ in bar) for bar in found] == pytest.approx([512] * 6)
    assert found[0][1][1] == pytest.approx(256, abs=8)


def test_a_rank_stands_out_in_its_metadata() -> None:
    meta = cpattn.plan(BATCH, 4).metadata(2, bucket=cpattn.Bucket(max_requests=8, max_rows=600, max_chunks=16))
    html = meta._repr_html_()
    assert table(html)["rank 2 of 4"].startswith(f"{meta.num_tokens} tokens in 600 rows, {len(meta.chunk_host.request)} chunks, ")
    assert table(html)["bucket"].startswith("Bucket(max_requests=8")
    for bar in bars(html):
        for color, _, is_pale in bar:
            assert is_pale == (color not in (PREFIX, RANK_COLORS[2]))


def test_its_size_does_not_grow() -> None:
    plan = cpattn.plan([(i % 9000, 1 + i * 37 % 5000) for i in range(2_000)], 512)
    html = plan._repr_html_()
    assert len(html) < 100_000
    assert len(bars(html)) == 12
    assert "12 of 2,000 requests, those with the most work" in html
    assert len(plan.metadata(511)._repr_html_()) < 100_000


def test_requests_that_are_alike_share_a_bar() -> None:
    html = cpattn.plan([(8192, 1)] * 256, 2)._repr_html_()
    assert [[color for color, _, _ in bar] for bar in bars(html)] == [[PREFIX, RANK_COLORS[0]], [PREFIX, RANK_COLORS[1]]]
    assert html.count("128 requests: 8,192 + 1") == 2
    assert "the most work" not in html


def test_names_are_escaped() -> None:
    def hostile(batch: IntArray, cp_size: int) -> cpattn.Chunks:
        return OwnPartition(3)(batch, cp_size)

    hostile.__name__ = "<script>alert('&')</script>"
    for partition, name in ((hostile, hostile.__name__), (lambda batch, n: OwnPartition(3)(batch, n), "<lambda>")):
        html = cpattn.plan(BATCH, 3, partition=partition)._repr_html_()
        assert name not in html
        assert table(html)["ranks"] == f"3: {name} partition"


@given(batch=batches(max_requests=20), options=any_plan_options())
@settings(max_examples=60, deadline=None)
def test_any_plan_can_be_shown(batch: Batch, options: dict[str, object]) -> None:
    plan = cpattn.plan(batch, **options)  # type: ignore[arg-type]
    shown = plan._repr_html_()
    found = len(bars(shown))
    # A longer batch has a bar for each kind, if they are not too many.
    assert found == sum(prefix + extend > 0 for prefix, extend in batch) if len(batch) <= 12 else found <= 12
    table(shown)
    table(plan.metadata(plan.cp_size - 1)._repr_html_())


def test_sharded_prefixes_are_named() -> None:
    plan = cpattn.plan([(4, 2)], 2, prefix_shards=[[1, 3]])
    assert table(plan._repr_html_())["ranks"] == "2: zigzag partition, balanced remainder, sharded prefixes"
    assert table(plan.metadata(0, torch.device("cpu"))._repr_html_())["rank 0 of 2"].endswith("on cpu")
