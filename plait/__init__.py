"""plait: one language model over many ranks, and a home for its keys and values."""
