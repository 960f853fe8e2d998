"""A destination that does nothing, so that the benchmark measures everything around it."""  # noqa: INP001 - loaded by path

import nexus_export


class Noop:
    """Takes every record and keeps none."""

    name = "noop"
    priority = 50
    enabled = True
    limits = nexus_export.Limits(concurrency=256)

    def validate_config(self) -> tuple[bool, str | None]:
        """Need nothing."""
        return True, None

    async def export(self, context: nexus_export.ExportContext) -> nexus_export.ExportResult:
        """Succeed at once."""
        return nexus_export.ExportResult(
            success=True, destination_name=self.name, record_id=context.session_identifier
        )
