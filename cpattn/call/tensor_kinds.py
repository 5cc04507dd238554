"""Tensors that are refused for what they are, whatever their shape: kernels read memory, and theirs is not what they show."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cpattn.errors import TensorMismatchError, UnsupportedError
from cpattn.graphs import is_exporting
from cpattn.ops import NOT_EXPORTED

# What a class has that leaves the work to torch. A class with another one, such as DTensor, holds its values elsewhere.
_PLAIN = Tensor.__torch_dispatch__


def check_kind(name: str, x: Any) -> None:
    """Raises TensorMismatchError for a tensor that is not plain memory, UnsupportedError within a transform of torch.func.

    A subclass of Tensor without a dispatch of its own, such as Parameter, is fine. What is no tensor is for others to refuse.
    """
    if not isinstance(x, Tensor):
        return
    if type(x).__torch_dispatch__ is not _PLAIN:
        if is_exporting():
            raise UnsupportedError(NOT_EXPORTED)
        raise TensorMismatchError(f"{name} is a {type(x).__name__}, {_instead_of_a_subclass(name, x)}")
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        raise UnsupportedError(
            f"{name} belongs to a transform of torch.func (vmap, grad, jvp), which cpattn's kernels cannot follow. Make this call outside "
            "of it: one call takes any number of requests, and computes the forward pass only"
        )
    # Before the layout, which some of these do not say.
    if x.is_nested:
        raise TensorMismatchError(
            f"{name} is a nested tensor, but kernels read one plain tensor; pass the rows of all requests one after another: "
            f"torch.cat({name}.unbind())"
        )
    if x.layout is not torch.strided:
        raise TensorMismatchError(f"{name} has layout {x.layout}, but kernels read dense memory with strides; pass {name}.to_dense()")
    if x.is_quantized:
        raise TensorMismatchError(
            f"{name} is quantised ({x.dtype}), but kernels read plain numbers, without a scale of their own; pass {name}.dequantize()"
        )


def _instead_of_a_subclass(name: str, x: Any) -> str:
    # By what they have, as importing their classes takes long.
    if hasattr(x, "to_local"):
        return f"but cpattn splits rows itself, and kernels read plain memory; pass this rank's part as a plain tensor: {name}.to_local()"
    if hasattr(x, "fake_mode"):
        return "which has a shape but no data; make this call with real tensors, outside of FakeTensorMode"
    if x.is_nested:
        return f"but kernels read one plain tensor; pass the rows of all requests one after another: {name}.values()"
    if type(x).__name__ == "AsyncCollectiveTensor":
        return f"the result of a collective that nobody has waited for; pass {name}.wait()"
    return "whose memory kernels cannot read; pass a plain torch.Tensor of the same values"


def in_words(x: Any) -> str:
    """What was passed for a tensor of another shape, for messages.

    >>> in_words(torch.zeros(2, 3)), in_words([2, 3])
    ('has shape (2, 3)', 'is a list')
    """
    return f"has shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"is a {type(x).__name__}"


def check_no_fp8(name: str, dtype: torch.dtype) -> None:
    """Raises UnsupportedError for new tensors in fp8, which no backend computes with."""
    if dtype.is_floating_point and dtype.itemsize == 1:
        raise UnsupportedError(
            f"{name} is {dtype}, and fp8 is for pages alone, which new keys and values are converted for; pass q, k and v in bf16, fp16 or "
            "fp32, and kv_cache=PagedKV(..., k_scale=, v_scale=) with pages in fp8. cpattn.attend takes queries in fp8 over those, with "
            "backend='flash_attn3'"
        )
