"""For record builders and listeners."""
