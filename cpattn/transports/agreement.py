"""Whether the ranks of a call agree: a small collective before it, and one after it, that turn a mistake of one rank into an
error on all."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cpattn import errors
from cpattn.errors import DisagreementError
from cpattn.transports.in_flight import InFlight
from cpattn.transports.transfer import Transfer
from cpattn.transports.transport import Transport

# Bytes that each rank sends.
_RECORD = 1024


class Account(NamedTuple):
    """What a rank says of the call that it is about to make.

    Attributes:
        label: that the caller gave the call.
        plan: in words, and its fingerprint.
        arguments: those that must be the same on every rank.
        refusal: why this rank will not make it, or None.
    """

    label: str
    plan: str
    arguments: str
    refusal: Exception | None = None


def agree(in_flight: InFlight, device: torch.device, account: Account) -> None:
    """Compares label, plan, arguments and the number of calls so far over the group, and spreads a refusal of one rank to
    all. Waits for the device.

    Raises:
        CPError: where a rank refuses: its own error there, and on the others one of the same class (if it is a class of
            cpattn's) that names it.
        DisagreementError: the ranks say different things; the message names the ranks.
    """
    calls_of, part, refusal = in_flight.transport.state.calls, in_flight.transport.part, account.refusal
    in_flight.expect(lambda: [_records(in_flight.transport, "accounts", device).transfer], counts=False)
    said = [str(calls_of[part]), account.label, account.plan, account.arguments, _named(refusal)]
    texts = _exchange(in_flight, "accounts", device, "\0".join(said))
    if refusal is not None:
        raise refusal
    for rank, text in enumerate(texts):
        if not text:
            raise DisagreementError(f"rank {rank} failed before it could say which call it makes; its own error says why")
    calls, labels, plans, argument_texts, refusals = zip(*((*text.split("\0"), "", "", "")[:5] for text in texts), strict=True)
    for rank, message in enumerate(refusals):
        if message:
            name, _, rest = message.partition(": ")
            raise getattr(errors, name, DisagreementError)(f"rank {rank} refused this call: {rest}")
    # Whoever goes on after this error counts from here.
    calls_of[part] = max(map(int, calls))
    _compare("label of this call", labels, "a rank has skipped a call, or swapped two: make the same calls in the same order on every rank")
    _compare(
        "number of calls so far on this group",
        calls,
        "a rank has skipped a call, or made one more: make the same calls in the same order on every rank",
    )
    _compare("plan", plans, "build the metadata from the same batch and options on every rank")
    _compare("arguments", argument_texts, "make the same call on every rank")


def expect_verdicts(transport: Transport, device: torch.device) -> list[Transfer]:
    """The transfer of :func:`share_verdicts`, which a checked call makes last."""
    return [_records(transport, "verdicts", device).transfer]


def share_verdicts(in_flight: InFlight, device: torch.device, refusal: Exception | None) -> None:
    """Spreads what one rank has found wrong with its own result to all, at the end of a call. Waits for the device.

    Raises:
        CPError: the rank's own ``refusal`` there, and on the others one of the same class that names it; DisagreementError
            where a rank has failed in the middle of the call.
    """
    texts = _exchange(in_flight, "verdicts", device, _named(refusal) or "right")
    if refusal is not None:
        raise refusal
    for rank, text in enumerate(texts):
        if not text:
            raise DisagreementError(f"rank {rank} failed in the middle of this call; its own error says why")
        if text != "right":
            name, _, rest = text.partition(": ")
            raise getattr(errors, name, DisagreementError)(f"rank {rank} found this of its own result: {rest}")


class _Records(NamedTuple):
    """A line of each rank, uint8 ``[size, bytes]``, this rank's own, and the transfer that brings the others'."""

    all: Tensor
    own: Tensor
    transfer: Transfer


def _records(transport: Transport, name: str, device: torch.device) -> _Records:
    everyone = transport.arena.buffer(name, (transport.size, _RECORD), torch.uint8, device)
    own = everyone[transport.rank]
    # A rank that fails before it has written its line sends an empty one.
    return _Records(everyone, own, transport.prepare_all_gather(everyone, own)._replace(fill_missing=own.zero_))


def _exchange(in_flight: InFlight, name: str, device: torch.device, text: str) -> list[str]:
    """Every rank's text, by the transfer that comes next."""
    records = _records(in_flight.transport, name, device)
    line = text.encode()[:_RECORD].ljust(_RECORD, b"\0")
    records.own.copy_(torch.frombuffer(bytearray(line), dtype=torch.uint8))
    in_flight.start().wait()
    lines = records.all.cpu()
    # A rank that did not come has said nothing.
    in_flight.transport.look_for_fault()
    return [bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in lines]


def _named(error: Exception | None) -> str:
    return "" if error is None else f"{type(error).__name__}: {error}"


def _compare(what: str, values: tuple[str, ...], fix: str) -> None:
    if len(set(values)) == 1:
        return
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    listed = "; ".join(f"rank{'s' * (len(who) > 1)} {', '.join(map(str, who))}: {value}" for value, who in ranks.items())
    raise DisagreementError(f"the ranks disagree on the {what}: {listed}; {fix}")
