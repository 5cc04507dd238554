"""torch.distributed.tensor.experimental.context_parallel: torch's own scaled_dot_product_attention in a zigzag ring."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.attention import SDPBackend, sdpa_kernel

from peers import flash_attn4_for_torch
from peers.work import Call, Unserved, Work, need_multiple, need_no_prefix


def by_cudnn(work: Work) -> Call:
    with ExitStack() as stack:
        return _context_parallel(work, SDPBackend.CUDNN_ATTENTION, stack)


def by_flash_attn4(work: Work) -> Call:
    """With FlashAttention-4 in place of torch's own flash kernel, which torch can put there itself (2.11 and later)."""
    with ExitStack() as stack:
        stack.callback(_activate_flash_attn4())
        return _context_parallel(work, SDPBackend.FLASH_ATTENTION, stack)


def _context_parallel(work: Work, kernel: SDPBackend, stack: ExitStack) -> Call:
    """One request, as it cuts all of a batch's at the same places; key/value heads repeated, as it takes no groups of heads.

    What is on the stack lasts as long as the call; where there is none, it ends here.
    """
    from torch.distributed.tensor.experimental import context_parallel

    if len(work.batch) > 1:
        raise Unserved("torch's context_parallel takes requests of one length")
    need_no_prefix(work, "torch's context_parallel")
    need_multiple(work, work.extends, 2 * work.size, "torch's context_parallel")
    block = work.tokens // (2 * work.size)
    blocks = torch.arange(work.tokens, device=work.device).view(-1, block)
    tokens = torch.cat([blocks[work.rank], blocks[-1 - work.rank]])
    heads = work.q.shape[1]
    # [1, heads, tokens, D]; cut in place when the context is entered.
    buffers = [x.repeat_interleave(heads // x.shape[1], dim=1).transpose(0, 1)[None].contiguous() for x in (work.q, work.k, work.v)]
    mesh = init_device_mesh(work.device.type, (work.size,))
    stack.enter_context(context_parallel(mesh, buffers=buffers, buffer_seq_dims=[2, 2, 2], no_restore_buffers=set(buffers)))
    # Their memory is still that of all tokens.
    q, k, v = (x.clone() for x in buffers)

    def run() -> Tensor:
        with sdpa_kernel(kernel):
            # By its module: the context has put its own function there.
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1)

    return Call(run, tokens, stack.pop_all().close)


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
