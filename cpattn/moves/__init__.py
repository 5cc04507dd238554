"""Rows of K, V and other tensors brought to where they are needed: into messages, into order, into and out of pages."""
