"""nexus-export: each microscopy record that was built ends up exactly once in every destination.

The way of a record::

    broker.py                RabbitMQ delivers ``record.built``
    pipeline/intake.py       the event becomes a job with steps, in one commit, then is acked
    pipeline/snapshot.py     the record is read once, checked, and kept by its sha256
    pipeline/engine.py       due steps are claimed, run and written down
    pipeline/decide.py       the one pure rule of what happens next
    destinations/            where records go
    pipeline/outbox.py       outcomes and dead letters go out, with confirms
    store/                   what is remembered in between

``main.py`` builds it all; ``config.py``, ``errors.py``, ``events.py`` and ``telemetry.py`` are the vocabulary.
"""
