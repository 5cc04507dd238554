"""Arguments that other attention functions have and cp_attention does not: what to write instead."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from cpattn.errors import OptionError

_ALWAYS_CAUSAL = "attention is always causal here; leave it out"
_IN_METADATA = "the metadata has the lengths of all requests; leave it out"
_IN_CACHE = "pages come with their table: kv_cache=cpattn.PagedKV(k_pages, v_pages, page_table)"
_NO_MASK = "there are no masks: who sees whom follows from the batch, and window= narrows it; leave it out, and shard no padding"
_NO_TREE = (
    "there are no masks, and so no trees of drafts in a request; make each branch a request of its own, which begins with the pages of its "
    "parent (KVPool.fork)"
)
_NO_DROPOUT = "cpattn is for inference, without dropout; leave it out"
_NO_FP8 = "q, k and v are bf16, fp16 or fp32, and fp8 is for pages: leave it out"
_SCALES_OF_PAGES = "pages in fp8 bring theirs: kv_cache=cpattn.PagedKV(..., k_scale=, v_scale=)"
_FOUND_OUT = "cpattn finds this out by itself; leave it out"

# PyTorch's scaled_dot_product_attention, flash-attn (2 to 4), FlashInfer, and the attention functions of Hugging Face.
_INSTEAD = {
    **dict.fromkeys(("is_causal", "causal"), _ALWAYS_CAUSAL),
    **dict.fromkeys(("attn_mask", "attention_mask", "mask", "key_padding_mask", "block_mask"), _NO_MASK),
    **dict.fromkeys(("custom_mask", "packed_custom_mask", "tree_mask", "tree_attn_bias"), _NO_TREE),
    **dict.fromkeys(("dropout_p", "dropout"), _NO_DROPOUT),
    **dict.fromkeys(("softmax_scale", "sm_scale", "scaling"), "pass it as scale="),
    **dict.fromkeys(("soft_cap", "logits_soft_cap", "softcapping"), "pass it as softcap=, and None where it is 0"),
    **dict.fromkeys(("s_aux", "learnable_sink", "sink"), "pass it as sinks="),
    "window_size": "(left, right) has left keys before a query's own: pass window=left + 1, and None where left is -1",
    "window_left": "it counts the keys before a query's own: pass window=window_left + 1, and None where it is -1",
    "sliding_window": "pass it as window=: how many keys a query sees, its own included",
    "enable_gqa": "heads of K and V are shared wherever there are fewer of them than of Q; leave it out",
    "alibi_slopes": "positional biases are not supported; cpattn gets keys that are rotated by meta.position_ids",
    "score_mod": "scores are scaled and softcapped alone; leave it out",
    "deterministic": "results are the same in every run; leave it out",
    **dict.fromkeys(("return_attn_probs", "return_softmax_lse", "return_aux"), "pass return_lse=True for the log-sum-exp"),
    **dict.fromkeys(("cu_seqlens", "cu_seqlens_q", "cu_seqlens_k", "cu_seq_lens_q", "cu_seq_lens_k", "cu_seq_q", "cu_seq_k"), _IN_METADATA),
    **dict.fromkeys(("max_seqlen", "max_seqlen_q", "max_seqlen_k", "max_length_q", "max_length_k", "max_q", "max_k"), _IN_METADATA),
    **dict.fromkeys(("seqused_q", "seqused_k", "cache_seqlens", "seq_lens"), _IN_METADATA),
    **dict.fromkeys(("block_table", "block_tables", "page_table", "k_cache", "v_cache", "past_key_value", "past_key_values"), _IN_CACHE),
    "q_descale": _NO_FP8,
    **dict.fromkeys(("k_descale", "v_descale", "k_scale", "v_scale"), _SCALES_OF_PAGES),
    **dict.fromkeys(("num_splits", "pack_gqa", "scheduler_metadata"), _FOUND_OUT),
    "expand": "it is for cp_attention and prepare; this call attends to the pages as they lie, in the absorbed form of MLA",
    "process_group": "pass it as group=",
    "mesh": "pass its context-parallel axis as group=: mesh['cp']",
}


def refuse_words(function: str, given: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raises OptionError for arguments that a function does not have, with what to write instead of each.

    >>> refuse_words("cp_attention", {"softmax_scale": 0.1}, [])
    Traceback (most recent call last):
    cpattn.errors.OptionError: cp_attention has no argument softmax_scale: pass it as scale=
    """
    said = []
    for name in given:
        near = get_close_matches(name, known, n=1)
        instead = _INSTEAD.get(name) or (f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}")
        said.append(f"{name}: {instead}")
    raise OptionError(f"{function} has no argument {'; and none '.join(said)}")
