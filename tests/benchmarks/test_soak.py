"""What the soak draws, and what it takes for growing memory; it runs by itself, as benchmarks/soak.py says."""

from __future__ import annotations

import soak
from inputs.cases import EXCHANGES, STRIPED_EXCHANGES


def test_all_ranks_draw_alike() -> None:
    first, second = ([str(soak.draw(3, number, "cpu", 2)) for number in range(60)] for _ in range(2))
    assert first == second
    assert len(set(first)) == 60


def test_the_first_batches_are_the_largest_of_each_exchange() -> None:
    exchanges = [*EXCHANGES, *STRIPED_EXCHANGES]
    drawn = [soak.draw(3, number, "cpu", 2) for number in range(80)]
    assert [(one.strategy, one.case.cache) for one in drawn[: len(exchanges)]] == exchanges
    sizes = [sum(prefix + extend for prefix, extend in one.case.batch) for one in drawn]
    assert min(sizes[: len(exchanges)]) >= max(one for one, batch in zip(sizes, drawn, strict=True) if batch.graph is None)
    later = drawn[len(exchanges) :]
    # Graphs, eager calls, batches of nothing but decodes, and some that leave a rank without tokens.
    assert {one.graph is None for one in later} == {True, False}
    assert any(one.case.batch and all(extend == 1 for _, extend in one.case.batch) for one in later)
    assert any(min(one.case.plan(2, **one.options).rank_tokens) == 0 for one in later)


def test_memory_that_grows_is_told() -> None:
    watch = soak.Watch()
    watch.note([{"rss": 300, "heaps": 1}, {"rss": 310, "heaps": 1}], is_warm=False)
    watch.note([{"rss": 300, "heaps": 1, "messages": 900}, {"rss": 310 + soak.SLACK["rss"], "heaps": 1}], is_warm=True)
    assert watch.grown() == {}
    watch.note([{"rss": 311 + soak.SLACK["rss"], "heaps": 2}], is_warm=True)
    assert watch.grown() == {"rss": f"310 to {311 + soak.SLACK['rss']} MiB", "heaps": "1 to 2"}
