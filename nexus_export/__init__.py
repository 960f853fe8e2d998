"""The public API of nexus-export, for plugins, record builders and listeners."""

from consumer.destinations.contract import (
    Absent,
    Answer,
    Destination,
    ExportContext,
    ExportResult,
    LastExport,
    Limits,
    Partial,
    Present,
    Unsure,
)
from consumer.errors import (
    ConfigurationError,
    DestinationError,
    Misconfigured,
    NexusExportError,
    Permanent,
    Transient,
    UnknownOutcome,
)

__all__ = [
    "Absent",
    "Answer",
    "ConfigurationError",
    "Destination",
    "DestinationError",
    "ExportContext",
    "ExportResult",
    "LastExport",
    "Limits",
    "Misconfigured",
    "NexusExportError",
    "Partial",
    "Permanent",
    "Present",
    "Transient",
    "UnknownOutcome",
    "Unsure",
]
