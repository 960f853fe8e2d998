"""The last plugin in the order."""

from tests.storm.shelf import Shelf


class StormD(Shelf):
    """Shelf D."""

    name = "storm_d"
    priority = 10
