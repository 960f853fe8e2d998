"""A destination as somebody else's package brings it: each build of a record becomes a line of a CSV file."""

import csv
import os
from pathlib import Path

from pydantic import BaseModel, Field

from nexus_export import Absent, ExportContext, ExportResult, Limits, Misconfigured, Present


class CsvLog:
    """Appends lines; the last one of a session tells which build is the newest."""

    name = "csv_log"
    priority = 20
    limits = Limits(concurrency=1)
    settle_seconds = 0

    class Settings(BaseModel):
        """Read from ``NX_CSV_LOG_*``."""

        path: Path | None = Field(None, description="the CSV file; without it nothing goes there")

    def __init__(self, settings: Settings) -> None:
        self._path = settings.path

    @property
    def disabled_because(self) -> str:
        """Name the setting that is missing, or nothing."""
        return "" if self._path else "NX_CSV_LOG_PATH is not set"

    @property
    def enabled(self) -> bool:
        """Tell whether there is a file to write to."""
        return not self.disabled_because

    def validate_config(self) -> tuple[bool, str | None]:
        """Check that the file can be made."""
        if self._path is None or not self._path.parent.is_dir():
            return False, f"the folder of NX_CSV_LOG_PATH ({self._path}) is not there"
        return True, None

    def verify(self, context: ExportContext) -> Present | Absent:
        """Look for the line of this build."""
        return Present(context.record_key) if self._newest(context) == context.record_sha256 else Absent()

    def export(self, context: ExportContext) -> ExportResult:
        """Append a line, and return when the disk has it."""
        if self._path is None:
            raise Misconfigured("NX_CSV_LOG_PATH is not set")
        if self._newest(context) != context.record_sha256:
            line = (context.record_key, context.record_sha256, context.session_identifier, context.instrument_pid)
            with self._path.open("a", encoding="utf-8", newline="") as file:
                csv.writer(file).writerow(line)
                file.flush()
                os.fsync(file.fileno())
        return ExportResult(success=True, destination_name=self.name, record_id=context.record_key)

    def _newest(self, context: ExportContext) -> str | None:
        if self._path is None or not self._path.exists():
            return None
        with self._path.open(encoding="utf-8", newline="") as file:
            return next((line[1] for line in reversed(list(csv.reader(file))) if line[0] == context.record_key), None)
