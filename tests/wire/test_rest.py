"""Times and columns as the API writes them."""

from datetime import UTC, datetime

import pytest

from vpn_sentinel.domain.verdict import MEANING, Code, Severity, State
from vpn_sentinel.wire.rest import PlaceBody, Resolver, findings_of, moment, place_of, resolvers_of, state_of, when


@pytest.mark.parametrize("never", [None, 0, 0.0])
def test_never_is_null(never: float | None) -> None:
    assert when(never) is None


def test_times_are_utc() -> None:
    assert when(1_800_000_000.5) == moment(1_800_000_000.5) == datetime(2027, 1, 15, 8, 0, 0, 500_000, UTC)


# -- JSON columns, as whoever shows them reads them


def test_a_stored_finding_takes_severity_and_advice_from_the_running_version() -> None:
    (finding,) = findings_of('[{"code": "dns_leak", "message": "It leaks.", "evidence": {"path": "outside"}}]')
    assert (finding.code, finding.severity, finding.message) == ("dns_leak", Severity.CRITICAL, "It leaks.")
    assert finding.advice == MEANING[Code.DNS_LEAK].advice
    assert finding.evidence == {"path": "outside"}


def test_a_finding_of_a_newer_version_is_shown_without_advice() -> None:
    (finding,) = findings_of('[{"code": "moon_full", "message": "It is full."}]')
    assert (finding.code, finding.severity, finding.advice) == ("moon_full", Severity.INFO, "")


def test_a_state_of_a_newer_version_is_unknown() -> None:
    assert state_of("leaking") is State.LEAKING
    assert state_of("paused_by_moon") is State.UNKNOWN


def test_places_and_resolvers_are_read() -> None:
    stored = '{"ip": "146.70.1.2", "source": "mmdb", "country": "NL"}'
    assert place_of(stored) == PlaceBody(ip="146.70.1.2", country="NL", source="mmdb")
    assert resolvers_of('[{"ip": "9.9.9.9"}]') == [Resolver(ip="9.9.9.9")]


@pytest.mark.parametrize("damaged", ["", "{", "null", "7"])
def test_a_damaged_column_is_nothing(damaged: str) -> None:
    assert findings_of(damaged) == []
    assert place_of(damaged) == PlaceBody()
    assert resolvers_of(damaged) == []
