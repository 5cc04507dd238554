"""vLLM 0.33: what its batches, block tables and caches are to cpattn, the way back, and an attention backend for its ``CUSTOM``.

>>> import cpattn, torch
>>> from types import SimpleNamespace
>>> from cpattn.integrations import vllm as cpattn_vllm
>>> step = SimpleNamespace(  # of vLLM's CommonAttentionMetadata what is looked at: a decode over 40 tokens, and a prompt of 9
...     num_reqs=2,
...     causal=True,
...     query_start_loc_cpu=torch.tensor([0, 1, 10], dtype=torch.int32),
...     seq_lens_cpu_upper_bound=torch.tensor([41, 9], dtype=torch.int32),
... )
>>> cpattn_vllm.batch_of(step).tolist()
[[40, 1], [0, 9]]
>>> plan = cpattn_vllm.plan_of(step, dcp_size=2, interleave=4)
>>> plan.held_lens.tolist()  # dcp_local_seq_lens of each rank
[[21, 20], [5, 4]]

Nothing here imports vLLM but the backend, when vLLM asks for it. Installed beside vLLM, cpattn registers it by itself:
``vllm serve MODEL --attention-backend CUSTOM``. What maps to what, line by line, and what vLLM lacks for more: ``docs/vllm.md``.
"""

from cpattn.integrations.vllm.batch import batch_of, plan_of
from cpattn.integrations.vllm.common_fields import common_fields
from cpattn.integrations.vllm.pages import pages_of
from cpattn.integrations.vllm.prefill_chunks import prefill_chunks
from cpattn.integrations.vllm.register import register

__all__ = ["batch_of", "common_fields", "pages_of", "plan_of", "prefill_chunks", "register"]
