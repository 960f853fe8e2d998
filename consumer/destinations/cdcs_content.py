"""What CDCS makes of a record's XML, found out without asking it: what it always refuses, valid or not.

CDCS keeps a second form of each record for its searches, as JSON in PostgreSQL. Every text that Python reads as a
number becomes one there, and all other texts go into a full-text index. What does not fit into either is answered
with 500, as is a record that breaks the schema, and a lost database.
"""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from lxml import etree

from consumer.destinations.http import one_line
from consumer.errors import Permanent

#: Most bytes of words that PostgreSQL's full-text index takes for one record.
INDEX_BYTES = 2**20 - 1

_LONGEST_WORD = 2046
_QUOTED_LENGTH = 40
# letters after a number are a word of their own, whose ending may be cut: 1e5running
_WORD = re.compile(r"[a-z]+[0-9][a-z0-9]*|[0-9](?:[a-z0-9]*[0-9])?")


class _Value(NamedTuple):
    """A text of a record, and where it stands."""

    text: str
    element: Any
    attribute: str | None = None

    def describe(self) -> str:
        """Return place and text for a message."""
        place = etree.QName(self.element).localname
        if self.attribute is not None:
            place = f"{etree.QName(self.attribute).localname} of {place}"
        # libxml2 counts lines anew for each question in a long record, so it is asked only now
        return f"line {self.element.sourceline}: {place} is {one_line(self.text, _QUOTED_LENGTH)!r}"


def read_document(content: bytes) -> Any:
    """Parse a record as CDCS does, and check it for what CDCS always refuses.

    Raises ``Permanent`` with the line and the reason: ``record_malformed``, ``record_doctype``, ``rejected``.
    """
    # blank texts are removed there too, before the record is validated
    parser = etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False, remove_blank_text=True)
    try:
        tree: Any = etree.fromstring(content, parser).getroottree()
    except etree.XMLSyntaxError as error:
        message = f"the record is no well-formed XML: {one_line(str(error))}"
        raise Permanent(message, code="record_malformed") from None
    if tree.docinfo.doctype:
        message = f"the record has a DOCTYPE ({one_line(tree.docinfo.doctype, 80)}), and CDCS takes none"
        raise Permanent(message, code="record_doctype")
    for value in _values(tree):
        if is_no_json_number(value.text):
            raise Permanent(f"{value.describe()}, a number that CDCS cannot store", code="rejected")
    if len(content) > INDEX_BYTES:
        size = word_bytes(value.text for value in _values(tree))
        if size > INDEX_BYTES:
            message = f"the record has {size} bytes of different words; CDCS indexes at most {INDEX_BYTES}"
            raise Permanent(message, code="rejected")
    return tree


def is_no_json_number(text: str) -> bool:
    """Tell whether CDCS takes a text for a number that JSON does not have: ``NaN``, ``-inf``, ``1e999``."""
    try:
        if math.isfinite(float(text)):
            return False
    except ValueError:
        return False
    try:
        int(text)  # a whole number beyond the range of floats is kept as it is, unless Python refuses its length
    except ValueError:
        return True
    return False


def word_bytes(texts: Iterator[str]) -> int:
    """Return how many bytes of an index the different words of some texts take at least.

    PostgreSQL cuts endings off words, drops some, and leaves out tags, entities, and words of two kilobytes. So only
    words with a digit are counted, which it keeps as they are, and nothing that may be part of what it leaves out:
    a record that it would take is never refused here.
    """
    words: set[str] = set()
    for text in texts:
        if "<" in text or "&" in text or _is_number(text):
            continue
        for part in text.lower().split():
            if "://" not in part and len(part.encode(errors="replace")) <= _LONGEST_WORD:
                words.update(_WORD.findall(part))
    return sum(map(len, words))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _values(tree: Any) -> Iterator[_Value]:
    """Yield all texts as CDCS sees them: attributes, and what stands in an element without its children."""
    for element in tree.iter("*"):
        for attribute, text in element.attrib.items():
            yield _Value(text, element, attribute)
        text = element.text or ""
        if len(element):
            text += "".join([child.tail or "" for child in element])
        text = text.strip()
        if text:
            yield _Value(text, element)
