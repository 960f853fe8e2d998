"""A plugin whose own time limit is shorter than the service's."""

from tests.storm.shelf import Shelf


class StormA(Shelf):
    """Shelf A."""

    name = "storm_a"
    priority = 100
    read_seconds = 2.0
