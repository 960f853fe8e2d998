"""A second destination, which links to the first one; its file is copied into the folder of plugins."""

from typing import Any

from nexus_export import Absent, ExportContext, Partial, Present
from tests.crash.destination import Doors


class Linker(Doors):
    """Writes the address of the record at ``doors`` into its own, at once or when it is known."""

    name = "linker"
    priority = 40
    links_to = ("doors",)
    door = "link"

    def body(self, context: ExportContext) -> dict[str, Any]:
        """Add the link, if there is one."""
        return {**super().body(context), "link": context.links.get("doors")}

    async def verify(self, context: ExportContext) -> Present | Partial | Absent:
        """Miss a link that could be there."""
        found = await super().verify(context)
        if isinstance(found, Present) and context.links:
            record = await self._ask("GET", f"{self._url}/records", params={"session": context.session_identifier})
            if record[0]["link"] != context.links["doors"]:
                return Partial(found.id)
        return found
