"""``python -m consumer`` is the command ``nexus-export``."""

if __name__ == "__main__":  # the reading process imports this module under another name
    from consumer.main import cli

    cli()
