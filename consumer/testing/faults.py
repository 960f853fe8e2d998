"""The wire faults that a destination has to survive, and what it may make of each: a checked-in table.

Each fault strikes one request of an attempt and then the wire is whole again. It strikes every request that changes
something (``writes``), every one that only reads (``reads``) and every one of a look-up (``looks``) in turn; which
endings are right there is said for each of the three. ``fault_strikes`` does what the table says.

The rule behind the table: a request that changes something and may have reached the server can only end as
``UnknownOutcome``, or as a success that the destination found out for itself. ``Transient`` and ``Misconfigured``
there promise that nothing was taken, and a look-up that answers ``Absent`` promises that nothing is there. Whether a
request that only reads is needed is the destination's matter: a success without its answer is right if the copy is.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal


class Seen(StrEnum):
    """How an attempt or a look-up ended."""

    SUCCESS = "success"
    TRANSIENT = "Transient"
    UNKNOWN = "UnknownOutcome"
    PERMANENT = "Permanent"
    MISCONFIGURED = "Misconfigured"
    PRESENT = "Present"
    PARTIAL = "Partial"
    ABSENT = "Absent"
    UNSURE = "Unsure"


#: When a fault acts: on the connection that would carry the request, on a request that the server never sees, or
#: on one that it has answered, so that whatever it changes is stored.
Stage = Literal["connection", "before", "after"]

_S, _T, _U = Seen.SUCCESS, Seen.TRANSIENT, Seen.UNKNOWN
_P, _M = Seen.PERMANENT, Seen.MISCONFIGURED

_UNKNOWN = frozenset({_U})
_UNKNOWN_OR_FOUND = frozenset({_U, _S})
_LATER = frozenset({_T, _S})
_LATER_OR_OVER = frozenset({_T, _U, _S})
_PERSON = frozenset({_M})
#: A look-up says that it does not know; ``Present`` where it has asked again by itself.
_NO_ANSWER = frozenset({Seen.PRESENT, Seen.UNSURE, _T, _M, _U})


@dataclass(frozen=True, slots=True)
class Fault:
    """One named fault.

    ``variants`` are forms of it, each tried. ``stalls``: no answer comes in time, so the attempt's limit has to
    end it. ``refuses``: the server says no, so a part that can be left out may be missing from a success that says so
    in ``metadata["warning"]``. ``wish`` gives the least and the most seconds, by variant, that the server's
    Retry-After must come to. ``sticky``: it holds until the attempt is over. ``heavy``: the memory that it takes is
    measured.
    """

    name: str
    does: str
    stage: Stage
    writes: frozenset[Seen]
    reads: frozenset[Seen] = _LATER
    looks: frozenset[Seen] = _NO_ANSWER
    variants: tuple[str, ...] = ("",)
    stalls: bool = False
    wish: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    refuses: bool = False
    sticky: bool = False
    heavy: bool = False


_ANY_WISH = (0.0, 7 * 86400.0)

FAULTS = (
    # --- the connection ---
    Fault("connection_refused", "nobody listens when the request is to leave", "connection", frozenset({_T}),
          sticky=True),
    Fault(
        "closed_at_accept", "the connection for the request is accepted and closed", "connection", frozenset({_U, _T})
    ),
    Fault(
        "reset_before_forward",
        "the request is read whole, then the connection is reset; the server never sees it",
        "before",
        _UNKNOWN,
    ),
    Fault(
        "lost_after_commit",
        "the server has answered; the connection is reset, or closed, without one byte of the answer",
        "after",
        _UNKNOWN_OR_FOUND,
        variants=("reset", "closed"),
    ),
    Fault(
        "late_commit",
        "no answer; the server gets the request only half of the settle time after the client has gone",
        "before",
        _UNKNOWN,
        _LATER_OR_OVER,
        stalls=True,
    ),
    Fault(
        "black_hole", "the request is taken and never answered nor passed on", "before", _UNKNOWN, _LATER_OR_OVER,
        stalls=True,
    ),
    Fault(
        "slow_drip", "the answer comes byte by byte and would take far longer than the attempt may", "after",
        _UNKNOWN_OR_FOUND, _LATER_OR_OVER, stalls=True,
    ),
    Fault(
        "closed_idle", "a whole answer that promises to keep the connection, which is then closed", "after",
        frozenset({_S, _U, _T}), _LATER_OR_OVER,  # the request that suffers is the next one
    ),
    # --- the answer is cut ---
    Fault("cut_in_headers", "the answer ends in its headers", "after", _UNKNOWN_OR_FOUND),
    Fault("cut_in_body", "the answer's body is shorter than its Content-Length", "after", _UNKNOWN_OR_FOUND),
    Fault("cut_in_chunk", "the answer ends in the middle of a chunk", "after", _UNKNOWN_OR_FOUND),
    Fault("empty_body", "the answer has the right status, no headers of its own and no body", "after",
          _UNKNOWN_OR_FOUND, frozenset({_T, _S, _M})),
    # --- the answer is another one ---
    Fault("error_body_200", "status 200 and an error as JSON, though the server did it", "after",
          _UNKNOWN_OR_FOUND, frozenset({_T, _S, _M})),
    Fault("login_page_200", "status 200 and the HTML page of a login; the server never sees the request", "before",
          frozenset({_U, _M}), frozenset({_T, _M, _S})),
    Fault("wrong_content_type", "the right answer, labelled application/octet-stream", "after", _UNKNOWN_OR_FOUND),
    Fault("wrong_encoding", "the answer is labelled UTF-8 and holds bytes that are not", "after", _UNKNOWN_OR_FOUND),
    Fault("redirect_loop", "302 to the same address, for ever", "before", frozenset({_M, _U}),
          frozenset({_M, _T, _S}), sticky=True),
    Fault("redirect_other_host", "307 to another host, which must not get the token", "before",
          frozenset({_M, _U}), frozenset({_M, _T, _S})),
    # --- the server refuses ---
    Fault("unauthorized_401", "401 once, in mid-batch", "before",
          _PERSON, _PERSON | {_S}, frozenset({_M, Seen.UNSURE, _T})),
    Fault("forbidden_403", "403 once, in mid-batch", "before", frozenset({_M, _P}), frozenset({_M, _P, _S}),
          frozenset({_M, _T, Seen.UNSURE}), refuses=True),
    Fault("not_found_404", "404 from a gateway, not from the service", "before", frozenset({_M, _P}),
          frozenset({_M, _P, _T, _S}), _NO_ANSWER | {Seen.ABSENT, Seen.PARTIAL}, refuses=True),
    Fault("request_timeout_408", "408", "before", _UNKNOWN),
    Fault("conflict_409", "409", "before", frozenset({_P, _T, _U}), frozenset({_P, _T, _M, _S}),
          refuses=True),
    Fault("too_large_413", "413 from a gateway", "before", frozenset({_P}), frozenset({_P, _T, _M, _S}),
          refuses=True),
    Fault("rate_limited", "429 without Retry-After", "before", frozenset({_T}), wish={"": (0, 0)}),
    Fault("rate_limited_seconds", "429 with Retry-After: 7", "before", frozenset({_T}),
          wish={"": (6.9, 7.1)}),
    Fault("rate_limited_date", "429 with Retry-After as a date 30 s after the Date of a clock that is hours off",
          "before", frozenset({_T}), variants=("slow", "fast"),
          wish={"slow": (29, 31), "fast": (29, 31)}),
    Fault("rate_limited_senseless", "429 with a Retry-After that is a word, negative, or a number of 30 digits",
          "before", frozenset({_T}), variants=("word", "negative", "endless"),
          wish={"word": (0, 0), "negative": (0, 0), "endless": _ANY_WISH}),
    # --- the server is in trouble ---
    Fault("error_500_before_commit", "500, and nothing was done", "before", _UNKNOWN),
    Fault("error_500_after_commit", "500, though the server did it", "after", _UNKNOWN_OR_FOUND),
    Fault("gateway_error_after_commit", "502, 503 with Retry-After: 7, or 504, though the server did it", "after",
          _UNKNOWN_OR_FOUND, variants=("502", "503", "504"), wish={"503": (6.9, 7.1)}),
    Fault("wrong_clock", "the right answer with a Date years off", "after", _UNKNOWN_OR_FOUND,
          variants=("1999", "2099")),
    # --- the answer is an attack ---
    Fault("huge_body", "an answer of half a gigabyte", "after", _UNKNOWN_OR_FOUND, frozenset({_T}), heavy=True),
    Fault("gzip_bomb", "a small gzip answer that becomes a quarter of a gigabyte", "after", _UNKNOWN_OR_FOUND,
          heavy=True),
    Fault("xml_bomb", "an answer of nested XML entities that become gigabytes", "after", _UNKNOWN_OR_FOUND,
          frozenset({_T, _S, _M}), heavy=True),
    Fault("duplicate_answer", "the answer comes twice on one connection, the second for nobody", "after",
          frozenset({_S, _U, _T})),
    Fault("garbage_before_answer", "bytes that are no HTTP come before the answer", "after", _UNKNOWN_OR_FOUND),
    Fault("continue_100", "three 100 Continue that nobody asked for and a 103 come before the answer", "after",
          _UNKNOWN_OR_FOUND),
    Fault("header_flood", "an answer with twenty thousand headers", "after", _UNKNOWN_OR_FOUND, heavy=True),
    Fault("tls_alert", "a TLS alert where plain HTTP was spoken", "before", _UNKNOWN),
)  # fmt: skip

BY_NAME = {fault.name: fault for fault in FAULTS}
