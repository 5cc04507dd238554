"""Bringing the rows of all ranks together as they are: one transfer, for calls that need nothing else."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from cpattn.transports.in_flight import InFlight
from cpattn.transports.transfer import Transfer


def gather_whole(in_flight: InFlight, name: str, x: Tensor) -> Tensor:
    """Every rank's ``x``, of the same shape and any dtype, rank after rank, in memory that the next call of that name uses again.

    What a rank fails to send has all bits set: NaN in fp64, fp32, bf16 and fp16, -1 in signed integers.
    """
    transport = in_flight.transport
    rank, size, is_ready = transport.rank, transport.size, x.is_contiguous()

    def gathered() -> Tensor:
        return transport.buffer(name, (size * x.shape[0], *x.shape[1:]), x.dtype, x.device)

    def make() -> list[Transfer]:
        if not x.numel():
            return []
        if is_ready:
            return [transport.prepare_all_gather(gathered(), x)]
        own = gathered().view(size, *x.shape)[rank]
        return [transport.prepare_all_gather(gathered(), own)._replace(fill_missing=partial(own.view(torch.uint8).fill_, 255))]

    in_flight.expect(make)
    everyone = gathered()
    if x.numel():
        if not is_ready:
            everyone.view(size, *x.shape)[rank].copy_(x)
        in_flight.start().wait()
    return everyone
