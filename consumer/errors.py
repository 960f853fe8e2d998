"""Errors, named by what happens next.

::

    NexusExportError
    ├── ConfigurationError      a person mends a setting; commands end with exit code 2
    ├── PoisonEventError        the delivery goes to the dead letters, nobody waits for it
    ├── RecordError             the record cannot be read as announced
    │   ├── RecordRefused       for good: every step fails with its code
    │   ├── RecordNotThereYet   asked for again for a while
    │   └── RecordsRootMissing  all work waits until the root is back
    └── DestinationError        raised by a destination
        ├── Transient           tried again later
        ├── Permanent           this step has failed
        ├── UnknownOutcome      the request may have had its effect: look before sending again
        └── Misconfigured       the destination's lane pauses, no attempt is burnt
"""

from datetime import datetime


class NexusExportError(Exception):
    """Something that this service understands and has a next step for."""


class ConfigurationError(NexusExportError):
    """A setting is missing or wrong; the message names it and says what to do."""


class PoisonEventError(NexusExportError):
    """A delivery that is no valid event.

    ``code`` is stable (``not_json``, ``not_cloudevent``, ``invalid_data``, ``id_reused``, ...). ``event_id``,
    ``source`` and ``session`` are there when they could be read, so that the builder can be told.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        source: str | None = None,
        event_id: str | None = None,
        session: str | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.source = source
        self.event_id = event_id
        self.session = session


class RecordError(NexusExportError):
    """The record cannot be read as announced; ``code`` is stable and documented."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class RecordRefused(RecordError):  # noqa: N818 - named by what happens next
    """The record breaks a rule that waiting does not mend."""


class RecordNotThereYet(RecordError):  # noqa: N818 - named by what happens next
    """The file is not there; network file systems lag, so it is asked for again for ten minutes."""


class RecordsRootMissing(RecordError):  # noqa: N818 - named by what happens next
    """The whole records root is gone (a lost mount): everything waits, nothing fails."""


class DestinationError(NexusExportError):
    """Base of what a destination raises; ``code`` is a stable short name for logs and outcomes."""

    code = "destination_error"

    def __init__(self, message: str = "", *, code: str | None = None) -> None:
        super().__init__(message or (type(self).__doc__ or "").splitlines()[0])
        if code is not None:
            self.code = code


class Transient(DestinationError):  # noqa: N818 - named by what happens next
    """The destination cannot take the record now; it surely has not taken it.

    ``retry_after`` (seconds from now, or a moment) is the destination's own wish and holds for all its work.
    """

    code = "transient"

    def __init__(
        self, message: str = "", *, retry_after: float | datetime | None = None, code: str | None = None
    ) -> None:
        super().__init__(message, code=code)
        self.retry_after = retry_after


class Permanent(DestinationError):  # noqa: N818 - named by what happens next
    """The destination will never take this record as it is."""

    code = "permanent"


class UnknownOutcome(DestinationError):  # noqa: N818 - named by what happens next
    """A request left and its answer is not known: it may have had its effect.

    ``retry_after`` is the destination's own wish, as for ``Transient``.
    """

    code = "unknown_outcome"

    def __init__(
        self, message: str = "", *, retry_after: float | datetime | None = None, code: str | None = None
    ) -> None:
        super().__init__(message, code=code)
        self.retry_after = retry_after


class Misconfigured(DestinationError):  # noqa: N818 - named by what happens next
    """A credential or setting of the destination is wrong: everything for it waits for a person."""

    code = "misconfigured"
