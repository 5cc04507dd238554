"""Whether the ranks of a call agree: one small collective that turns a would-be hang into the same error on all."""

from __future__ import annotations

import torch

from cpattn import errors
from cpattn.errors import DisagreementError
from cpattn.exchange.communicator import Communicator

# Bytes that each rank sends: fingerprint, arguments and the beginning of an error message.
_RECORD = 1024


def agree(communicator: Communicator, device: torch.device, fingerprint: str, arguments: str, refusal: Exception | None) -> None:
    """Compares plan and arguments over the group, and spreads a refusal of one rank to all. Waits for the device.

    Raises:
        CPError: where a rank refuses: its own error there, and on the others one of the same class (if it is a class of
            cpattn's) that names it.
        DisagreementError: plans or arguments differ; the message names the ranks.
    """
    error = f"{type(refusal).__name__}: {refusal}" if refusal else ""
    text = "\0".join([fingerprint, arguments, error]).encode()[:_RECORD]
    record = torch.frombuffer(bytearray(text.ljust(_RECORD, b"\0")), dtype=torch.uint8).to(device)
    gathered = torch.empty(communicator.size * _RECORD, dtype=torch.uint8, device=device)
    communicator.all_gather(gathered, record).wait()
    texts = [bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in gathered.cpu().view(-1, _RECORD)]
    fingerprints, argument_texts, refusals = zip(*((*text.split("\0"), "", "")[:3] for text in texts), strict=True)

    if refusal:
        raise refusal
    for rank, message in enumerate(refusals):
        if message:
            name, _, rest = message.partition(": ")
            raise getattr(errors, name, DisagreementError)(f"rank {rank} refused this call: {rest}")
    _compare("plan (by fingerprint)", fingerprints, "build the metadata from the same batch and options on every rank")
    _compare("arguments", argument_texts, "make the same call on every rank")


def _compare(what: str, values: tuple[str, ...], fix: str) -> None:
    if len(set(values)) == 1:
        return
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    listed = "; ".join(f"rank{'s' * (len(who) > 1)} {', '.join(map(str, who))}: {value}" for value, who in ranks.items())
    raise DisagreementError(f"the ranks disagree on the {what}: {listed}; {fix}")
