"""Batches, tensors and caches that tests are given, drawn at random or written down."""
