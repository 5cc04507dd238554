"""What one call of each strategy does, step by step: as its ``forward`` does, with who attends to what of its schedule."""
