"""What is remembered: tables, connection and the transactions on them; the only door to SQLAlchemy."""
