"""What the first call of a batch sends to the device: all of its tables in one copy, and later ones nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from devices.peers_on_host import let_read

import cpattn
from cpattn.device_tables import DeviceTables
from cpattn.testing import SoloCommunicator

BATCHES = {"one": [(0, 40)], "several": [(20, 9), (0, 30), (7, 1)]}
PAGE = 16


class Copies:
    """How many there were since the last time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.many = 0
        make = DeviceTables.__init__

        def counted(tables: DeviceTables, *given: Any) -> None:
            self.many += 1
            make(tables, *given)

        monkeypatch.setattr(DeviceTables, "__init__", counted)

    def take(self) -> int:
        """And none from here on."""
        many, self.many = self.many, 0
        return many


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Copies:
    return Copies(monkeypatch)


def cache_of(plan: cpattn.Plan, kind: str) -> cpattn.PagedKV | cpattn.PackedKV | None:
    if kind == "packed":
        k, v = torch.randn(2, plan.num_prefix_tokens, 2, 16)
        return cpattn.PackedKV(k, v) if plan.num_prefix_tokens else None
    table = torch.arange(4 * len(plan.batch), dtype=torch.int32).view(-1, 4)
    k_pages, v_pages = torch.randn(2, table.numel(), PAGE, 2, 16)
    return cpattn.PagedKV(k_pages, v_pages, table)


@pytest.mark.parametrize("reads_peers", [False, True], ids=["collectives", "peers"])
@pytest.mark.parametrize("kind", ["packed", "pages"])
@pytest.mark.parametrize("batch", BATCHES)
def test_tables_of_a_call_come_in_one_copy(copies: Copies, batch: str, kind: str, reads_peers: bool) -> None:
    group, plan = SoloCommunicator(1, 2), cpattn.plan(BATCHES[batch], 2)
    if reads_peers:
        let_read(group)
    meta = plan.metadata(1)
    assert copies.take() == 1
    assert len(meta.token_index) == len(meta.position_ids) == meta.rows
    assert copies.take() == 1
    q, k, v = (torch.randn(meta.rows, heads, 16) for heads in (4, 2, 2))
    cache = cache_of(plan, kind)
    # The reference reads pages as they are.
    made = []
    for _ in range(2):
        cpattn.cp_attention(q, k, v, meta, kv_cache=cache, group=group, strategy="all_gather", backend="reference")
        made.append(copies.take())
    assert made == [1, 0]
