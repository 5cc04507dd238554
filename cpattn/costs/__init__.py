"""What a call will cost on a kind of machine, before anything is computed."""
