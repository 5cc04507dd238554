"""A draft: tables of a batch that are worked out when they are asked for, and may then be sent together with others."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from cpattn.device_tables import Unsent

T = TypeVar("T")


@dataclass(frozen=True)
class Draft(Generic[T]):
    """What :meth:`cpattn.CPMetadata.derive_sent` makes once a batch. It is worked out on the host alone, from the plan.

    Attributes:
        key: by which it is kept.
        make: works it out.
    """

    key: Hashable
    make: Callable[[], Unsent[T]]
