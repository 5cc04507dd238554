"""Adapters to other libraries, each imported only when asked for: nothing else in cpattn imports them."""
