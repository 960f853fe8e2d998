"""Destinations without limits of their own, and one with the pace of LabArchives."""  # noqa: INP001 - loaded by path

from benchmarks.bulkhead.ward import Ward
from nexus_export import Limits


class Alpha(Ward):
    """The one that something is wrong with."""

    name = "alpha"


class Beta(Ward):
    """A neighbour."""

    name = "beta"


class Gamma(Ward):
    """Another neighbour."""

    name = "gamma"


class Delta(Ward):
    """The fourth."""

    name = "delta"


class Paced(Ward):
    """One request a second, over all records and processes."""

    name = "paced"
    limits = Limits(concurrency=1, min_interval_seconds=1.0)
    paces_requests = True
