"""How bytes get from rank to rank, and the memory that they travel between."""
