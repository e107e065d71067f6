"""Context parallelism: Ring and Ulysses attention over a sequence that is cut over ranks."""
