"""What :func:`cpattn.attend` makes: attention over pages that hold everything already. Nothing is sent or written."""

from __future__ import annotations

from typing import NamedTuple

from cpattn.exchange.attend import Attend
from cpattn.exchange.keys_at_hand import WholePages
from cpattn.exchange.schedule import Hop, Schedule, sends
from cpattn.exchange.strategy import IO, Setup, Strategy
from cpattn.kv_cache import PagedKV
from cpattn.metadata.layout import Layout
from cpattn.problem import Problem
from cpattn.transports.transfer import Transfer


class _Resident(NamedTuple):
    pages: WholePages
    transfers: tuple[Transfer, ...] = ()


def _schedule(problem: Problem, plan: Layout) -> Schedule:
    return (Hop(queries=0, keys="all", alignment="bottom_right", results=1, sent=sends(problem, plan, 0)),)


def _prepare(setup: Setup) -> _Resident:
    return _Resident(WholePages.of(setup, setup.kv))


def _forward(held: _Resident, io: IO, attend: Attend) -> None:
    assert isinstance(io.cache, PagedKV)
    attend(held.pages.keys(io.cache), held.pages.spans)


RESIDENT = Strategy("resident", _schedule, _prepare, _forward, stored=True)
