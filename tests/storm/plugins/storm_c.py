"""A plugin that leaves time limits to the service."""

from tests.storm.shelf import Shelf


class StormC(Shelf):
    """Shelf C."""

    name = "storm_c"
    priority = 90
