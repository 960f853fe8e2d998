"""The way of a record: intake, snapshot, engine, decide, retry, lanes, outbox."""
