"""Plan options for property tests, and batches by name; the batches are those that are shipped for users' tests."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import strategies as st

from cpattn.testing.batches import NAMED_BATCHES as NAMED_BATCHES
from cpattn.testing.strategies import Batch as Batch
from cpattn.testing.strategies import batches as batches
from cpattn.testing.strategies import lengths as lengths
from inputs.own_partitions import OwnPartition


def named_batches(names: Iterable[str] = NAMED_BATCHES) -> list[Any]:
    """For ``pytest.mark.parametrize("batch", named_batches())``: a test id for each name, without blanks."""
    return [pytest.param(NAMED_BATCHES[name], id=name.replace(" ", "-")) for name in names]


def non_empty_batches(**limits: int) -> st.SearchStrategy[Batch]:
    """:func:`batches` with at least one new token."""
    return batches(**limits).filter(lambda batch: any(extend_len for _, extend_len in batch))


cp_sizes = st.integers(1, 8)
partitions = st.sampled_from(["zigzag", "contiguous"])
remainders = st.sampled_from(["balanced", "first"])
pad_tos = st.sampled_from([1, 2, 3, 8, 64])


def plan_options() -> st.SearchStrategy[dict[str, Any]]:
    """All arguments of ``cpattn.plan`` but the batch, with the partitions that cut all requests alike."""
    return st.fixed_dictionaries({"cp_size": cp_sizes, "partition": partitions, "remainder": remainders, "pad_to": pad_tos})


def named_plan_options() -> st.SearchStrategy[dict[str, Any]]:
    """Those, or ``"whole"`` and ``"uncut"``, which have no remainder rule."""
    whole = st.sampled_from(["whole", "uncut"])
    return plan_options() | st.fixed_dictionaries({"cp_size": cp_sizes, "partition": whole, "pad_to": pad_tos})


def any_plan_options() -> st.SearchStrategy[dict[str, Any]]:
    """Those, or a caller's own partition, which has none either."""
    own = st.builds(OwnPartition, st.integers(0, 10**6))
    return named_plan_options() | st.fixed_dictionaries({"cp_size": cp_sizes, "partition": own, "pad_to": pad_tos})
