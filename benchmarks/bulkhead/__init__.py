"""The proof that destinations are bulkheads: what is wrong with one stays with it."""
