"""What changes from batch to batch compiles nothing anew: each form of the attention kernels takes seconds. What a release changes does."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
from inputs.paged_keys import in_pages, make_case
from inputs.ragged_inputs import compiled_only, make_qkv
from inputs.stored_inputs import BF16, E4M3, options_of, stored_keys

from cpattn.keys import Keys

pytest.importorskip("triton")
from triton.compiler import ASTSource

from cpattn.kernels import attention_config
from cpattn.kernels import ragged_attention as module
from cpattn.kernels.ragged_attention import ragged_attention, specialized_kernel


@compiled_only
@pytest.mark.parametrize("stored", [BF16, E4M3])
def test_page_tables_of_any_width_and_requests_of_any_number(stored: torch.dtype) -> None:
    """A table is as wide as the longest request of a batch: one page, a multiple of 16, and others."""
    hopper = specialized_kernel(torch.device("cuda"))
    launcher = module._attention if hopper is None else hopper._attention
    counts = []
    for longest, requests in ((16, 3), (16 * 5, 1), (16 * 14, 2), (16 * 30, 17)):
        lens = [longest - i for i in range(requests)]
        rows = make_case(lens, [1] * requests, list(range(requests)), lens, "cuda")
        q, k, v = make_qkv(rows, sum(lens), (8, 8), (128, 128), BF16, "cuda", 1)
        keys = stored_keys(k, v, stored, "head" if stored == E4M3 else "none")
        # Two entries more than pages, so that widths are 3, 7, 16 and 32.
        k_pages, v_pages, paged = in_pages(keys.k, keys.v, rows, lens, 16, torch.int32, 5)
        given = Keys(k_pages, v_pages, paged.page_table, keys.k_scale, keys.v_scale)
        ragged_attention(q, given, paged, options_of({}, q.device))
        counts.append(len(launcher.compiled))
    assert len(set(counts)) == 1, counts


def test_a_release_that_works_something_else_out_of_a_config_is_compiled_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton keeps kernels on disk, for processes to come, by the source of device code and by what is constant."""

    class Kernel:
        """What Triton asks a kernel."""

        __name__, arg_names, cache_key = "kernel", ["C"], "the same"

    def key(config: Any) -> str:
        return str(ASTSource(Kernel(), {"C": "constexpr"}, {(0,): config}, {}).hash())

    def config_of(of: Any) -> Any:
        # PACK 2, NUM_HEADS 8.
        return of.AttentionConfig(8, 4, 2, *[64] * 4, 128, 1, *[False] * 4, 0, False, 0, False, False)

    source = Path(attention_config.__file__).read_text()
    other = tmp_path / "other_config.py"
    other.write_text(source.replace("return self.NUM_HEADS // self.PACK", "return self.NUM_HEADS"))
    spec = spec_from_file_location("other_config", other)
    assert spec is not None
    assert spec.loader is not None
    changed = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "other_config", changed)
    spec.loader.exec_module(changed)
    ours, theirs = config_of(attention_config), config_of(changed)
    assert (ours.HEADS, theirs.HEADS) == (4, 8)
    assert repr(ours) == repr(theirs)
    assert key(ours) == key(config_of(attention_config)) != key(theirs)
