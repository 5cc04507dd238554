"""What is tuned for: this GPU, with the sizes that were asked for."""

from __future__ import annotations

import datetime
from typing import NamedTuple

import torch

from cpattn.attention.backend import Call
from cpattn.attention.registry import BACKENDS
from cpattn.cli.traffic import Shape
from cpattn.errors import CPError
from cpattn.kernels.tile_candidates import ShapeSet
from cpattn.kernels.tile_entry import TileEntry, TileKey
from cpattn.kernels.tile_shapes import padded_dims
from cpattn.kernels.tile_table import compiled_triton


class Target(NamedTuple):
    """A GPU, and the attention to be fast on it.

    Attributes:
        shape: heads, head dims and dtype of the batches that are timed; of these, the number of heads is no part of the key.
    """

    device: torch.device
    shape: Shape
    key: TileKey

    @property
    def of_kernel(self) -> tuple[int, int, torch.dtype, tuple[int, int], bool, bool]:
        """The arguments of :func:`cpattn.kernels.tile_shapes.tile_shapes`."""
        key = self.key
        return key.head_dim, key.v_head_dim, key.dtype, key.capability, key.specialized, key.v_in_k

    def entry(self, shapes: ShapeSet, gain: float) -> TileEntry:
        """For the table, with what it was measured on."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        return TileEntry(shapes=shapes, device=name, torch=torch.__version__, date=today, gain=round(gain, 4))


def find_target(shape: Shape, v_in_k: bool) -> Target:
    """The current GPU with these sizes. Raises CPError if there is none, or the kernel can not serve them."""
    if not torch.cuda.is_available():
        raise CPError("tuning needs a CUDA device, as it times kernels on it; torch finds none here (`cpattn env` says more)")
    device = torch.device("cuda", torch.cuda.current_device())
    dtype: torch.dtype = getattr(torch, shape.dtype)
    one_step = Call(device, dtype, shape.head_dim, shape.v_head_dim, False, False, False, frozenset({"bottom_right"}), merges=False)
    reason = BACKENDS["triton"].why_not(one_step)
    if reason:
        raise CPError(f"backend triton can not serve this: {reason}")
    check_v_in_k(shape, v_in_k)
    triton = compiled_triton()
    if triton is None:
        raise CPError("kernels run in Triton's interpreter, of which nothing is to be timed; unset TRITON_INTERPRET")
    from cpattn.kernels import ragged_attention

    specialized = ragged_attention.specialized_kernel(device) is not None
    capability = torch.cuda.get_device_capability(device)
    return Target(device, shape, TileKey(capability, shape.head_dim, shape.v_head_dim, dtype, specialized, v_in_k, triton))


def check_v_in_k(shape: Shape, v_in_k: bool) -> None:
    """Raises CPError if V can not be read from K's blocks."""
    if not v_in_k:
        return
    dims = padded_dims(shape.head_dim, shape.v_head_dim)
    if shape.v_head_dim > shape.head_dim or dims.d != dims.dv:
        raise CPError(
            f"--v-in-k with head dims {shape.head_dim} and {shape.v_head_dim}: V is read from K's blocks only where both "
            f"are padded to one size, and these are to {dims.d} and {dims.dv}; leave it out"
        )
