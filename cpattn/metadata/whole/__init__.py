"""Partition ``whole``: from a batch to chunks, with as few requests cut as ranks need to be even.

``divide`` takes the best of the ``candidates``. Each begins with a ``division`` of ``work`` over ranks, and makes it even by
``even_out`` and ``share_out``, unless ``completion`` says that it cannot be; ``few_requests`` looks at all divisions.
``zigzag_cut`` makes chunks of what is cut, and ``sharded_caches`` says which rank takes which share where each rank keeps what it
computes.
"""
