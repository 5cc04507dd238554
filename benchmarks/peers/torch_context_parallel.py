"""torch.distributed.tensor.experimental.context_parallel: torch's own scaled_dot_product_attention in a zigzag ring."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.attention import SDPBackend, sdpa_kernel

from peers import flash_attn4_for_torch
from peers.work import Call, Unserved, Work, need_multiple, need_no_prefix

# What is undone when the last call is closed, and how many there are.
_entered = ExitStack()
_open_calls: list[object] = []


def by_torchs_kernels(work: Work) -> Call:
    """With cuDNN's kernel where that can serve the call, which is torch's fastest own on a Hopper GPU, or its flash kernel."""
    with ExitStack() as stack:
        return _context_parallel(work, [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], stack)


def by_flash_attn4(work: Work) -> Call:
    """With FlashAttention-4 in place of torch's own flash kernel, which torch can put there itself (2.11 and later)."""
    with ExitStack() as stack:
        stack.callback(_activate_flash_attn4())
        return _context_parallel(work, [SDPBackend.FLASH_ATTENTION], stack)


def _context_parallel(work: Work, kernels: list[SDPBackend], stack: ExitStack) -> Call:
    """One request, as it cuts all of a batch's at the same places; key/value heads repeated, as it takes no groups of heads.

    What is on the stack lasts as long as the call; where there is none, it ends here.
    """
    if len(work.batch) > 1:
        raise Unserved("torch's context_parallel takes requests of one length")
    need_no_prefix(work, "torch's context_parallel")
    need_multiple(work, work.extends, 2 * work.size, "torch's context_parallel")
    stack.enter_context(_functions_in_place(work))
    blocks = torch.arange(work.tokens, device=work.device).view(2 * work.size, -1)
    tokens = torch.cat([blocks[work.rank], blocks[-1 - work.rank]])
    # [1, heads, tokens, D]
    heads = work.q.shape[1]
    repeated = [x[tokens].repeat_interleave(heads // x.shape[1], dim=1) for x in (work.q, work.k, work.v)]
    q, k, v = (x.transpose(0, 1)[None].contiguous() for x in repeated)

    def run() -> Tensor:
        with sdpa_kernel(kernels, set_priority=True):
            # By its module: the context has put its own function there.
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1)

    return Call(run, tokens, stack.pop_all().close)


@contextmanager
def _functions_in_place(work: Work) -> Iterator[None]:
    """torch's context, as long as any call is there. It is not for being entered twice."""
    from torch.distributed.tensor.experimental import context_parallel

    if not _open_calls:
        mesh = init_device_mesh(work.device.type, (work.size,))
        # It wants a tensor to cut, in the form of q.
        positions = torch.arange(work.tokens, device=work.device).view(1, 1, -1, 1)
        _entered.enter_context(context_parallel(mesh, buffers=[positions], buffer_seq_dims=[2], no_restore_buffers={positions}))
    call = object()
    _open_calls.append(call)
    try:
        yield
    finally:
        _open_calls.remove(call)
        if not _open_calls:
            _entered.close()


def _activate_flash_attn4() -> Callable[[], object]:
    """Returns what puts torch's own kernel back."""
    import torch.nn.attention as choices

    try:
        from torch.nn.attention._fa4 import register_flash_attention_fa4

        register, activate, restore = (getattr(choices, f"{what}_flash_attention_impl") for what in ("register", "activate", "restore"))
    except (ImportError, AttributeError) as missing:
        raise Unserved(f"torch {torch.__version__} cannot put FlashAttention-4 in place of its own kernel: {missing}") from None
    register("FA4, forward", register_fn=partial(register_flash_attention_fa4, module_path=flash_attn4_for_torch.__name__))
    activate("FA4, forward")
    return partial(restore)
