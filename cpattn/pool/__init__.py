"""KVPool: the books of an engine's pages."""
