"""What the durable path costs, measured beside programs without it."""
