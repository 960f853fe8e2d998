"""Who and what eLabFTW's test server starts with: keys, users, categories, settings. For tests only."""

from dataclasses import dataclass

SERVICE_KEY = "3-5e41ce0000000000000000000000000000000000"
READ_ONLY_KEY = "4-4ead000000000000000000000000000000000000"
PERSON_KEY = "5-9e450000000000000000000000000000000000aa"
ADMIN_KEY = "6-ad3100000000000000000000000000000000000b"
STRANGER_KEY = "7-57a40000000000000000000000000000000000cc"


class Refused(Exception):  # noqa: N818 - an answer, no failure
    """The answer is an error; ``code`` is the one inside of the body."""

    def __init__(self, status: int, text: str, code: int | None = None) -> None:
        super().__init__(text)
        self.status, self.text, self.code = status, text, code or status


@dataclass(frozen=True, slots=True)
class Account:
    """Who a key belongs to."""

    key: str
    number: int
    userid: int
    can_write: bool = True
    admin: bool = False
    team: int = 1


@dataclass(slots=True)
class Settings:
    """What an administrator decides about the server; each can be set while it runs."""

    version: str = "6.0.0"
    site_url: str = "https://elab.example.org"
    tags_forbidden: bool = False
    force_template: bool = False
    create_forbidden: bool = False
    use_markdown: bool = False
    max_upload_bytes: int = 100 * 1024**2
    #: a word that the purifier takes out besides: what it lets through differs between versions
    purified_word: str = ""

    @property
    def number(self) -> tuple[int, int]:
        """Return the version as two numbers."""
        major, minor = self.version.split(".")[:2]
        return int(major), int(minor)


ACCOUNTS = (
    Account(SERVICE_KEY, 3, 1),
    Account(READ_ONLY_KEY, 4, 4, can_write=False),
    Account(PERSON_KEY, 5, 2),
    Account(ADMIN_KEY, 6, 3, admin=True),
    Account(STRANGER_KEY, 7, 5, team=2),
)
USERS = (
    {"userid": 1, "firstname": "Export", "lastname": "Service", "email": "export@example.org", "orgid": None},
    {"userid": 2, "firstname": "Ada", "lastname": "Lovelace", "email": "ada@example.org", "orgid": "alovelace"},
    {"userid": 3, "firstname": "Grace", "lastname": "Hopper", "email": "grace@example.org", "orgid": None},
    {"userid": 4, "firstname": "Rea", "lastname": "Only", "email": "rea@example.org", "orgid": None},
    {"userid": 5, "firstname": "Some", "lastname": "Body", "email": "somebody@example.org", "orgid": None},
)
CATEGORIES = ({"id": 1, "title": "Microscopy", "color": "29aeb9"}, {"id": 2, "title": "Synthesis", "color": "54aa08"})
STATUSES = ({"id": 1, "title": "Running", "color": "29aeb9"}, {"id": 2, "title": "Success", "color": "54aa08"})
