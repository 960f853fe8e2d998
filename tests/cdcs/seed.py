"""Fill a migrated, empty database: two users with known tokens and two templates.

usage: seed.py XSD-FILE

The Nexus template is the second in the list of templates on purpose: a client that takes the first one, as
NexusLIMS does, meets the wrong one.
"""

import os
import sys
from pathlib import Path

import django

ADMIN_TOKEN = "a" * 40
PLAIN_TOKEN = "b" * 40
DECOY_XSD = '<xs:schema xmlns:xs="http://www.w3.org/2001/XMLSchema"><xs:element name="Other"/></xs:schema>'


def seed_users() -> None:
    """Create `admin` (superuser) and `plain` (an ordinary user of the group that CDCS gives everyone)."""
    from django.contrib.auth.models import Group, User
    from rest_framework.authtoken.models import Token

    admin = User.objects.create_superuser("admin", "admin@example.org", "admin")
    plain = User.objects.create_user("plain", "plain@example.org", "plain")
    plain.groups.add(Group.objects.get(name="default"))
    Token.objects.create(user=admin, key=ADMIN_TOKEN)
    Token.objects.create(user=plain, key=PLAIN_TOKEN)


def seed_template(title: str, filename: str, content: str) -> None:
    """Upload a schema for everybody, over REST, as an administrator does."""
    from rest_framework.test import APIClient

    client = APIClient()
    client.credentials(HTTP_AUTHORIZATION=f"Token {ADMIN_TOKEN}")
    template = {"title": title, "filename": filename, "content": content}
    answer = client.post("/rest/template/global/", template, format="json")
    if answer.status_code != 201:
        raise SystemExit(f"template {title!r}: {answer.status_code} {answer.content[:500]!r}")


def main() -> None:
    """Seed the database that CDCS_TEST_DATABASE names."""
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "cdcs_min.settings")
    django.setup()
    seed_users()
    seed_template("Another Schema", "another.xsd", DECOY_XSD)
    seed_template("Nexus Experiment Schema", "nexus-experiment.xsd", Path(sys.argv[1]).read_text("utf-8"))


if __name__ == "__main__":
    main()
