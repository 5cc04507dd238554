"""Hugging Face transformers 5: causal decoder models with their sequence sharded over the ranks of a group.

>>> import torch, transformers
>>> from cpattn.integrations import transformers as cpattn_hf
>>> import cpattn
>>> cpattn_hf.register()
>>> config = transformers.LlamaConfig(
...     vocab_size=99, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
... )
>>> model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="cpattn")
>>> meta = cpattn.build_metadata([(0, 5), (0, 2)], cp_size=1, cp_rank=0)  # two prompts, of 5 and of 2 tokens
>>> input_ids = torch.randint(99, (7,))  # one after another, without padding, the same on every rank
>>> with torch.no_grad(), cpattn_hf.context_parallel(model, meta) as cp:
...     logits = cp.gather(model(**cp.inputs(input_ids)).logits)
...     next_token = cp.gather_last(model(**cp.inputs(input_ids, last_only=True)).logits).argmax(-1)
>>> logits.shape, next_token.shape
(torch.Size([7, 99]), torch.Size([2]))

Sliding windows, softcap and sinks of the model are honoured; what cannot be is refused with a :class:`cpattn.CPError`.
A context has no KV cache: every request starts at its first token. :func:`generate` has one, over the ranks of the group.
"""

try:
    import transformers
except ImportError as missing:
    raise ImportError("cpattn.integrations.transformers needs Hugging Face transformers: pip install 'cpattn[transformers]'") from missing

if int(transformers.__version__.split(".")[0]) < 5:
    raise ImportError(f"cpattn.integrations.transformers needs transformers 5 or newer, found {transformers.__version__}")

from cpattn.integrations.transformers.attention import NAME, register
from cpattn.integrations.transformers.context import ContextParallel
from cpattn.integrations.transformers.context_error import ContextError
from cpattn.integrations.transformers.enter import context_parallel
from cpattn.integrations.transformers.generation import generate

__all__ = ["NAME", "ContextError", "ContextParallel", "context_parallel", "generate", "register"]
