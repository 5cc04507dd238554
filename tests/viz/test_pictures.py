"""Pictures: any plan can be drawn, alike each time; all that a reader needs is in them, and nothing overlaps."""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inputs.own_partitions import OwnPartition
from inputs.strategies import Batch, named_batches

import cpattn
from cpattn import Chunks
from cpattn.metadata.batch import IntArray
from cpattn.viz import draw_plan_picture, draw_ring_picture, draw_work_picture, ring_schedule
from cpattn.viz.canvas import PictureError, canvas
from cpattn.viz.captions import text_width, wrapped
from cpattn.viz.palette import INK, ink_on, rank_color, rank_hatch, tint
from cpattn.viz.plan_picture import is_small

pytest.importorskip("matplotlib")
SMALL = cpattn.plan([(4, 11), (0, 5), (6, 1)], 2, pad_to=2)


def texts(svg: Path) -> list[str]:
    """matplotlib writes each text as outlines, with the text itself in a comment."""
    return [text.strip() for text in re.findall(r"<!--(.*?)-->", svg.read_text(), re.DOTALL)]


def fills(svg: Path) -> Counter[str]:
    return Counter(color.upper() for color in re.findall(r"fill: (#[0-9a-f]{6})", svg.read_text()))


def test_a_small_plan_is_drawn_token_by_token(tmp_path: Path) -> None:
    draw_plan_picture(SMALL, tmp_path / "plan.svg")
    written = Counter(texts(tmp_path / "plan.svg"))
    assert is_small(SMALL)
    assert written["request 0: 4 cached + 11 new"] == 1
    assert (written["prefix"], written["new"]) == (2, 3)
    assert written["padding"] == 2  # one row on rank 0, two on rank 1
    # A name a chunk, and one for the rows that the rank holds.
    chunks = Counter(chunk.rank for chunk in SMALL.chunks)
    assert (written["rank 0"], written["rank 1"]) == (chunks[0] + 1, chunks[1] + 1)
    # Each token's position: over its column, beside its row, and in its rank's rows.
    assert written["14"] == 3
    # A cell for each pair of a query and a new key; and for each new token one over, one beside and one in the rows.
    colors = fills(tmp_path / "plan.svg")
    for rank in range(2):
        new_pairs = sum(chunk.start + token + 1 for chunk in SMALL.chunks if chunk.rank == rank for token in range(chunk.length))
        prefix_pairs = sum(chunk.length * SMALL.batch[chunk.request].prefix_len for chunk in SMALL.chunks if chunk.rank == rank)
        assert colors[rank_color(rank)] == new_pairs + 3 * SMALL.rank_tokens[rank]
        assert colors[tint(rank_color(rank))] == prefix_pairs


def test_a_large_plan_is_drawn_chunk_by_chunk(tmp_path: Path) -> None:
    plan = cpattn.plan([(0, 1531), (2048, 700), (512, 0)], 4, pad_to=128)
    draw_plan_picture(plan, tmp_path / "plan.svg")
    written = texts(tmp_path / "plan.svg")
    assert not is_small(plan)
    for text in ("request 0", "0 cached + 1,531 new", "2,048 cached + 700 new", "nothing new", f"{plan.rows} rows", "rank 3"):
        assert text in written
    assert Counter(written)[f"padding {plan.rows - plan.rank_tokens[1]}"] >= 1
    assert Counter(written)["2"] == 4  # the chunks of rank 2


def test_a_small_sharded_plan_says_who_holds_each_token(tmp_path: Path) -> None:
    plan = cpattn.plan([(4, 11), (0, 5), (6, 1)], 2, owner=cpattn.Striped(2))
    draw_plan_picture(plan, tmp_path / "plan.svg")
    written, colors = Counter(texts(tmp_path / "plan.svg")), fills(tmp_path / "plan.svg")
    assert written["held by rank"] == 3
    draw_plan_picture(cpattn.plan(plan.batch, 2), tmp_path / "replicated.svg")
    replicated, before = Counter(texts(tmp_path / "replicated.svg")), fills(tmp_path / "replicated.svg")
    for rank, held in enumerate(plan.held_lens.sum(axis=0).tolist()):
        assert written[str(rank)] - replicated[str(rank)] == held
        assert colors[rank_color(rank)] - before[rank_color(rank)] == held


def test_a_large_sharded_plan_says_what_each_rank_holds(tmp_path: Path) -> None:
    plan = cpattn.plan([(0, 1531), (2048, 700)], 4, prefix_shards=[(0,) * 4, (1000, 500, 500, 48)], pad_to=128)
    draw_plan_picture(plan, tmp_path / "plan.svg")
    written = texts(tmp_path / "plan.svg")
    assert "The tokens that each rank's cache holds after the step" in written
    assert f"{max(plan.held_lens.sum(axis=0)):,} tokens" in written
    assert Counter(written)["rank 3"] == 2
    assert any("sharded prefixes" in text for text in written)


def test_of_many_requests_those_with_the_most_work_are_drawn(tmp_path: Path) -> None:
    draw_plan_picture(cpattn.plan([(0, 10 + number) for number in range(30)] + [(0, 999)], 2), tmp_path / "plan.svg")
    written = texts(tmp_path / "plan.svg")
    assert "0 cached + 999 new" in written
    assert any("12 of 31 requests, those with the most work" in text for text in written)


@pytest.mark.parametrize("cp_size", [3, 5, 7, 8, 16, 32])
def test_each_chunk_has_its_number(tmp_path: Path, cp_size: int) -> None:
    draw_plan_picture(cpattn.plan([(100, 4099)], cp_size), tmp_path / "plan.svg")
    written = Counter(texts(tmp_path / "plan.svg"))
    assert [written[str(rank)] for rank in range(1, cp_size)] == [2] * (cp_size - 1)
    assert [written[f"rank {rank}"] for rank in range(cp_size)] == [1] * cp_size
    assert any("Colours and numbers: ranks." in text for text in written)


def test_numbers_are_promised_where_they_are(tmp_path: Path) -> None:
    """As many as have room at 64 ranks, and a chunk too thin for one."""
    thin = Chunks(*np.array([[0, 0, 0, 0, 0], [0, 500, 501, 502, 503], [500, 1, 1, 1, 497], [0, 1, 0, 1, 0]]))
    plans = [cpattn.plan([(0, 4096)], 64), cpattn.plan([(0, 1000)], 2, partition=lambda batch, cp_size: thin)]
    for plan in plans:
        draw_plan_picture(plan, tmp_path / "plan.svg")
        written = texts(tmp_path / "plan.svg")
        assert any("Colours: ranks; numbers too, where there is room." in text for text in written)
        assert 1 < sum(text.isdecimal() for text in written) - 1 < len(plan.chunks)


def test_equal_requests_share_a_panel(tmp_path: Path) -> None:
    draw_plan_picture(cpattn.plan([(8192, 1)] * 256, 4), tmp_path / "plan.svg")
    written = Counter(texts(tmp_path / "plan.svg"))
    assert written["256 requests of"] == written["8,192 cached + 1 new"] == 1
    assert written["64 requests"] == written["64 requests of 8,192 + 1"] == 4  # in each rank's band and rows
    assert [written[str(rank)] for rank in (1, 2, 3)] == [1, 1, 1]
    draw_plan_picture(cpattn.plan([(8, 1024)] * 32 + [(0, 1)] * 8, 4), tmp_path / "plan.svg")
    written = Counter(texts(tmp_path / "plan.svg"))
    assert written["32 requests of"] == written["8 requests of"] == 1
    # Of those that are cut the first: a number a chunk, and a band a rank of the others.
    assert [written[str(rank)] for rank in (2, 3)] == [3, 3]


def test_what_is_too_thin_to_be_seen_leaves_no_dashes(tmp_path: Path) -> None:
    draw_plan_picture(cpattn.plan([(0, 4096)], 3), tmp_path / "plan.svg")  # a row of padding in 1,366
    assert "url(#h" not in (tmp_path / "plan.svg").read_text()
    draw_plan_picture(cpattn.plan([(0, 4096)], 3, pad_to=1000), tmp_path / "plan.svg")
    assert "url(#h" in (tmp_path / "plan.svg").read_text()
    draw_work_picture([cpattn.plan([(0, 4096)], 3)], tmp_path / "work.svg")  # the mean is where the bars end
    assert "dasharray" not in (tmp_path / "work.svg").read_text()


def test_what_is_empty_says_so(tmp_path: Path) -> None:
    for plan in (cpattn.plan([], 4), cpattn.plan([(8, 0)], 4), cpattn.plan([(800, 0)] * 20, 4), cpattn.plan([], 16)):
        draw_plan_picture(plan, tmp_path / "plan.svg")
        draw_work_picture([plan], tmp_path / "work.svg")
        draw_ring_picture(ring_schedule(plan), tmp_path / "ring.svg")
        written = " ".join(texts(tmp_path / "plan.svg"))
        assert "no rows" in written
        assert ("No requests." in written) == (not plan.batch)
        assert "Pale" not in written
        assert "nothing to compute" in texts(tmp_path / "work.svg")
        assert any("nothing to compute" in text for text in texts(tmp_path / "ring.svg"))


def test_one_is_singular(tmp_path: Path) -> None:
    draw_plan_picture(cpattn.plan([(1000, 1)], 1), tmp_path / "plan.svg")
    assert {"1 row", "1 rank, zigzag partition, balanced remainder. Colours and numbers: ranks. Pale: keys of the prefix."} <= set(
        texts(tmp_path / "plan.svg")
    )


def test_each_hop_has_its_number(tmp_path: Path) -> None:
    draw_ring_picture(ring_schedule(cpattn.plan([(0, 3670)], 16)), tmp_path / "ring.svg")
    written = Counter(texts(tmp_path / "ring.svg"))
    assert [written[str(rank)] for rank in range(1, 16)] == [16 + 15] * 15
    assert any(text.startswith("Colour and number: whose keys. ") for text in written)
    draw_ring_picture(ring_schedule(cpattn.plan([(0, 3670)], 4), transfer=0.01), tmp_path / "ring.svg")
    assert any(text.startswith("Colour: whose keys; a number too, where there is room. ") for text in texts(tmp_path / "ring.svg"))


def test_only_who_computes_over_cached_keys_is_said_to(tmp_path: Path) -> None:
    draw_ring_picture(ring_schedule(cpattn.plan([(600, 1), (0, 400)], 2, partition="contiguous")), tmp_path / "ring.svg")
    written = texts(tmp_path / "ring.svg")
    assert "keys of rank 0 and cached ones" in written
    assert "keys of rank 1 and cached ones" not in written


def test_a_long_line_is_broken_between_words() -> None:
    lines = wrapped(["Some words.", "", "And a_name_that_is_far_too_long_for_any_line."], 1.5)
    assert lines[0].startswith("Some words.")
    assert lines[-1].endswith("\u2026")
    assert all(0 < text_width(line) <= 1.5 for line in lines)


@pytest.mark.parametrize("batch", named_batches())
def test_any_plan_can_be_drawn(tmp_path: Path, batch: Batch) -> None:
    _draw_all(cpattn.plan(batch, 3), tmp_path)


@pytest.mark.parametrize("batch", named_batches(["no requests", "nothing new", "one token", "one long beside 63 short"]))
def test_any_plan_of_one_rank_can_be_drawn(tmp_path: Path, batch: Batch) -> None:
    _draw_all(cpattn.plan(batch, 1), tmp_path)


@pytest.mark.parametrize("batch", named_batches(["no requests", "one token after a prefix", "divides evenly"]))
def test_plans_of_many_ranks_can_be_drawn(tmp_path: Path, batch: Batch) -> None:
    """But for their ring, which is refused."""
    _draw_all(cpattn.plan(batch, 70), tmp_path, ring=False)


def _draw_all(plan: cpattn.Plan, folder: Path, ring: bool = True) -> None:
    draw_plan_picture(plan, folder / "plan.svg")
    draw_work_picture([plan], folder / "work.svg")
    if ring:
        draw_ring_picture(ring_schedule(plan), folder / "ring.svg")


@pytest.mark.parametrize("suffix", [".svg", ".png", ".pdf"])
def test_a_picture_is_the_same_each_time(tmp_path: Path, suffix: str) -> None:
    made = []
    for name in ("a", "b"):
        draw_plan_picture(SMALL, tmp_path / f"{name}{suffix}")
        made.append((tmp_path / f"{name}{suffix}").read_bytes())
    assert made[0] == made[1]


def test_the_readers_own_settings_change_nothing(tmp_path: Path) -> None:
    import matplotlib

    draw_work_picture([SMALL], tmp_path / "a.svg")
    with matplotlib.rc_context({"font.size": 30.0, "axes.facecolor": "red", "lines.linewidth": 9.0}):
        draw_work_picture([SMALL], tmp_path / "b.svg")
        assert matplotlib.rcParams["font.size"] == 30.0
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def a_partition_whose_name_is_so_long_that_it_has_to_be_broken_somewhere(batch: IntArray, cp_size: int) -> Chunks:
    return OwnPartition(3)(batch, cp_size)


PLANS = {
    "small": SMALL,
    "many small": cpattn.plan([(3, 9), (0, 12), (30, 1), (2, 7), (5, 0), (0, 1)], 3, pad_to=8),
    "mixed": cpattn.plan([(0, 1531), (2048, 700), (0, 7), (997, 1), (512, 0), (0, 1), (333, 89), (0, 240)], 4, pad_to=128),
    "16 ranks": cpattn.plan([(0, 3670)], 16),
    "mixed over 16 ranks": cpattn.plan([(0, 1531), (2048, 700), (0, 7), (997, 1), (333, 89), (0, 240)], 16),
    "64 ranks": cpattn.plan([(0, 3670)], 64),
    "decode": cpattn.plan([(8192, 1)] * 200, 7),
    "long contexts": cpattn.plan([(131072, 1048576), (2**30, 98765), (0, 2**29), (7, 123456789)], 3),
    "small striped": cpattn.plan([(4, 11), (0, 5), (6, 1)], 2, owner=cpattn.Striped(2)),
    "mixed sharded": cpattn.plan([(0, 1531), (2048, 700), (0, 7), (997, 1), (333, 89)], 4, owner=cpattn.Striped(16)),
    "a long name": cpattn.plan([(0, 150), (9, 3)], 5, partition=a_partition_whose_name_is_so_long_that_it_has_to_be_broken_somewhere),
}


# A ring over 64 ranks has 8,000 texts, which take minutes to compare. How caches are sharded changes the picture of a plan alone.
PLAN_ALONE = ["small striped", "mixed sharded"]
OVERLAPS = [("plan", name) for name in PLANS]
OVERLAPS += [(kind, name) for kind in ("ring", "work") for name in PLANS if name not in PLAN_ALONE and (kind, name) != ("ring", "64 ranks")]


@pytest.mark.parametrize(("kind", "name"), OVERLAPS, ids=map("-".join, OVERLAPS))
def test_texts_do_not_overlap_and_are_large_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, name: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    plan, boxes = PLANS[name], []

    def keep(figure: Any, *arguments: Any, **options: Any) -> None:
        agg = FigureCanvasAgg(figure)
        agg.draw()  # type: ignore[no-untyped-call]
        for text in figure.findobj(Text):
            # An axis that is off still has tick labels, which are not drawn.
            drawn = text.axes is None or text.axes.axison or text in text.axes.texts
            if text.get_text().strip() and text.get_visible() and drawn:
                assert text.get_fontsize() >= 7
                box = text.get_window_extent(agg.get_renderer())  # type: ignore[no-untyped-call]
                assert -1 <= box.x0 <= box.x1 <= figure.bbox.width + 1, text.get_text()
                assert -1 <= box.y0 <= box.y1 <= figure.bbox.height + 1, text.get_text()
                boxes.append((text.get_text(), box))

    monkeypatch.setattr(Figure, "savefig", keep)
    path = tmp_path / "picture.png"
    if kind == "plan":
        draw_plan_picture(plan, path)
    elif kind == "ring":
        draw_ring_picture(ring_schedule(plan), path)
    else:
        draw_work_picture([cpattn.plan(plan.batch, plan.cp_size, partition="contiguous"), plan], path)
    assert len(boxes) > 5
    boxes.sort(key=lambda entry: entry[1].x0)
    for number, (text, box) in enumerate(boxes):
        for other_text, other in boxes[number + 1 :]:
            if other.x0 >= box.x1 - 1:
                break
            assert min(box.y1, other.y1) - max(box.y0, other.y0) <= 2, f"{text!r} overlaps {other_text!r}"


def test_errors_name_the_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PictureError, match=r"a picture's name ends in \.png, \.svg or \.pdf"):
        draw_plan_picture(SMALL, tmp_path / "plan.jpeg")
    with pytest.raises(PictureError, match="choose a folder that exists"):
        draw_plan_picture(SMALL, tmp_path / "nowhere" / "plan.svg")
    with pytest.raises(PictureError, match="a ring over 65 ranks is too large to draw; 64 ranks at most"):
        draw_ring_picture(ring_schedule(cpattn.plan([(0, 9)], 65)), tmp_path / "ring.svg")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(PictureError, match=r"pip install 'cpattn\[viz\]'"), canvas(tmp_path / "plan.svg", 1, 1):
        pass


def contrast(one: str, other: str) -> float:
    """WCAG 2: from 1 to 21."""

    def luminance(color: str) -> float:
        channels = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted([luminance(one), luminance(other)], reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("rank", range(8))
def test_what_is_written_on_a_colour_can_be_read(rank: int) -> None:
    for color in (rank_color(rank), tint(rank_color(rank))):
        assert contrast(ink_on(color), color) >= 4.5
    assert contrast(INK, "#FFFFFF") >= 7


def test_ranks_differ_in_colour_or_hatch() -> None:
    assert len({(rank_color(rank), rank_hatch(rank)) for rank in range(64)}) == 64


def test_neighbours_differ_in_print() -> None:
    for rank in range(7):
        assert contrast(rank_color(rank), rank_color(rank + 1)) > 1.25
