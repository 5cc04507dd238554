"""``python -m cpattn``: a file a command."""
