"""A plugin with the same priority as its neighbour."""

from tests.storm.shelf import Shelf


class StormB(Shelf):
    """Shelf B."""

    name = "storm_b"
    priority = 90
    read_seconds = 2.0
