"""``python -m consumer`` is the command ``nexus-export``."""

from consumer.main import cli

cli()
