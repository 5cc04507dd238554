"""Batches as a serving engine would make them of public traffic, and what is measured over them."""
