"""Serving engines: a small one of our own, and parts of vLLM and SGLang, their own files or what stands in for them."""
