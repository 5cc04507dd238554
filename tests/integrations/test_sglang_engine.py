"""cpattn's strategy beside SGLang's own, in SGLang's own classes: the same random forward batches through its helpers, backend and pool.

``make test-engines`` fetches its wheel; without it these tests are skipped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from engines.sglang_batches import Case, Ran, compare_with_oracle, forward_batch_of, parallel_of, random_case, run_rank
from engines.sglang_standin import RANK, standing_in
from torch import Tensor

from cpattn.errors import UnsupportedError
from cpattn.integrations.sglang import replace_zigzag
from cpattn.testing import run_loopback

BATCHES = 150


class Strategies(NamedTuple):
    """SGLang's own class, and what its plugin loader has put in its place."""

    own: Any
    cpattn: Any
    release: str


@pytest.fixture(scope="module")
def strategies() -> Iterator[Strategies]:
    with standing_in() as release:
        import sglang.srt.plugins as plugins
        from sglang.srt.layers.cp import zigzag

        own = zigzag.ZigzagCPStrategy
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plugins, "entry_points", entry_points)
            plugins.load_plugins()
        yield Strategies(own, zigzag.ZigzagCPStrategy, release)


def entry_points(group: str) -> list[Any]:
    """Those of this checkout, whether it is installed or not."""
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    found = re.search(rf'^\[project\.entry-points\."{re.escape(group)}"\]\n(\w+) = "(.*)"$', text, re.MULTILINE)
    return [EntryPoint(found[1], found[2], group)] if found else []


def run(case: Case, strategy: Any, cp_size: int, pool_class: str = "MHATokenToKVPool") -> list[Ran]:
    from sglang.srt.layers.cp import base

    base._STRATEGY = strategy(cp_size=cp_size)
    return run_loopback(lambda transport: run_rank(case, transport, pool_class), size=cp_size)


def test_nothing_else_of_sglang_is_replaced(strategies: Strategies) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry

    assert HookRegistry._patched == {"sglang.srt.layers.cp.zigzag.ZigzagCPStrategy"}
    assert issubclass(strategies.cpattn, strategies.own)
    assert (strategies.cpattn.name, strategies.cpattn.kind.cli_value) == ("zigzag", "zigzag")


def test_an_interface_that_is_not_known_is_refused_in_one_line(strategies: Strategies, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.layers.cp import zigzag
    from sglang.srt.plugins.hook_registry import HookRegistry

    class Later(strategies.own):  # type: ignore[misc, name-defined]
        def run_attention(self, q: Tensor, step: Any) -> None: ...

    monkeypatch.setattr(zigzag, "ZigzagCPStrategy", Later)
    before = len(HookRegistry._hooks["sglang.srt.layers.cp.zigzag.ZigzagCPStrategy"])
    with pytest.raises(UnsupportedError, match=r"in this one \(0\.5\.23\) ZigzagCPStrategy\.run_attention takes \(q step\)") as refused:
        replace_zigzag()
    assert "\n" not in str(refused.value)
    assert len(HookRegistry._hooks["sglang.srt.layers.cp.zigzag.ZigzagCPStrategy"]) == before


@pytest.mark.parametrize("cp_size", [2, 4])
def test_random_forward_batches(strategies: Strategies, cp_size: int) -> None:
    refused = 0
    for seed in range(BATCHES):
        case = random_case(seed, cp_size)
        theirs, ours = run(case, strategies.own, cp_size), run(case, strategies.cpattn, cp_size)
        assert all(ran.was_split for ran in ours)
        # With cpattn nothing of a layer travels through SGLang's own collectives, and its own kernel attends to none.
        assert {(ran.own_gathers, ran.kernel_calls) for ran in ours} == {(0, 0)}
        compare_with_oracle(case, ours)
        compare_with_oracle(case, theirs)
        # So that graphs of SGLang's own sizes can be replayed.
        assert ours[0].rows <= theirs[0].rows or not theirs[0].was_split
        refused += not theirs[0].was_split
    print(f"SGLang {strategies.release}, cp_size {cp_size}: {BATCHES} forward batches, of which its own strategy refuses {refused}")
    assert BATCHES // 4 < refused < BATCHES * 3 // 4


@pytest.mark.parametrize("cp_size", [2, 3])
def test_over_a_pool_that_cpattn_does_not_know(strategies: Strategies, cp_size: int) -> None:
    """Then SGLang's pool writes, and its own kernel attends, in one launch or two; what asks for a window or sinks as well."""
    launches = set()
    for seed in range(20):
        case = random_case(seed, cp_size)
        ours = run(case, strategies.cpattn, cp_size, "AnotherPool")
        assert all(ran.was_split for ran in ours)
        compare_with_oracle(case, ours)
        launches |= {ran.kernel_calls / len(case.layers) for ran in ours}
    assert launches == {1, 2}


def test_layers_with_a_window_may_have_a_pool_of_their_own(strategies: Strategies) -> None:
    compared = 0
    for seed in range(60):
        case = random_case(seed, 2)
        if case.layers[1].window is None:
            continue
        compared += 1
        for strategy in (strategies.own, strategies.cpattn):
            ranks = run(case, strategy, 2, "SWAKVPool")
            compare_with_oracle(case, ranks)
        assert {ran.kernel_calls for ran in ranks} == {0}
    assert compared > 30


def test_over_a_pool_in_fp8(strategies: Strategies) -> None:
    """SGLang's kernel attends for both, to the same numbers in the same places."""
    for seed in range(20):
        case = random_case(seed, 2)._replace(kv_dtype=torch.float8_e4m3fn)
        theirs, ours = run(case, strategies.own, 2), run(case, strategies.cpattn, 2)
        for mine, own in zip(ours, theirs, strict=True):
            assert mine.was_split
            assert mine.kernel_calls > 0
            for number, pools in enumerate(zip(mine.pool, own.pool, strict=True)):
                assert torch.equal(mine.outs[number], own.outs[number])
                assert all(torch.equal(x[case.page_size :], y[case.page_size :]) for x, y in zip(*pools, strict=True))


def test_latents(strategies: Strategies) -> None:
    """MLA: the latents in the pool, and what a kernel of SGLang's makes of each row, are those of SGLang's own strategy."""
    compared = 0
    for seed in range(30):
        case = random_case(seed, 2)
        theirs, ours = (latents(case, strategy) for strategy in (strategies.own, strategies.cpattn))
        for mine, own in zip(ours, theirs, strict=True):
            if own is not None:
                compared += 1
                assert mine is not None
                assert all(torch.equal(x, y) for x, y in zip(mine, own, strict=True))
    assert compared > 10


def latents(case: Case, strategy: Any) -> list[tuple[Tensor, Tensor] | None]:
    """Of each rank the results of all rows, and the latents that the pool was to write; None where the batch is not split."""
    from sglang.srt.layers.cp import base, utils

    base._STRATEGY = strategy(cp_size=2)

    def attend(q: Tensor, cu_seqlens_q: Tensor, k_len: Tensor, max_seqlen_q: int) -> Tensor:
        """In the place of a kernel: each row times the keys that it sees."""
        lengths = cu_seqlens_q.diff().tolist()
        seen = [torch.arange(keys - length, keys) + 1 for length, keys in zip(lengths, k_len.tolist(), strict=True)]
        return q * torch.cat(seen)[:, None, None]

    def program(transport: Any) -> tuple[Tensor, Tensor] | None:
        RANK.parallel = parallel_of(transport)
        written: list[Tensor] = []
        pool = SimpleNamespace(set_mla_kv_buffer=lambda layer, places, nope, rope: written.append(torch.cat([nope, rope], dim=-1)))
        RANK.backend = SimpleNamespace(token_to_kv_pool=pool)
        forward_batch = forward_batch_of(case)
        if not utils.is_cp_active(forward_batch):
            return None
        utils.prepare_cp_forward(forward_batch)
        x = utils.cp_shard_hidden_states(case.x, forward_batch)
        base.get_cp_strategy().materialize_full_mla_kv(forward_batch, None, x[:, :1, :6], x[:, :1, 6:])
        out = base.get_cp_strategy().run_attention(x, forward_batch, "cpu", attend)
        assert torch.equal(written[0], case.x[:, :1])
        return utils.cp_gather_after_forward(out, forward_batch), written[0]

    return run_loopback(program, size=2)
