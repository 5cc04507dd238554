"""From a call's arguments to a prepared call: what is refused, what is chosen, and where it is remembered."""
