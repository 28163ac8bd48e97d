"""Log lines: one an event, and nothing from outside can make a second."""

import io
import logging
import re
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vpn_sentinel.runtime.logs import LineFormatter, open_log
from vpn_sentinel.runtime.user_error import UserError


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """What a logger of ours writes."""
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(LineFormatter())
    logger = logging.getLogger("vpn_sentinel.uplink")
    logger.addHandler(handler)
    logger.propagate = False
    yield written
    logger.removeHandler(handler)
    logger.propagate = True


log = logging.getLogger("vpn_sentinel.uplink")


def test_a_line_says_when_how_loud_who_and_what(lines: io.StringIO) -> None:
    log.error("connection lost", extra={"url": "https://a", "tries": 3, "why": "timed out", "none": ""})
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ ERROR uplink connection lost url=https://a tries=3 "
        r'why="timed out" none=""\n',
        lines.getvalue(),
    )


@pytest.mark.parametrize(
    ("value", "shown"),
    {
        "nl-1": "nl-1",
        "Zürich": "Zürich",
        "a\nb": r"a\nb",
        "\x1b[31m": r"\x1b[31m",
        "\u2028": r"\u2028",
        "\u202e": r"\u202e",
        "\ud800": r"\ud800",
        'a" level="b': r'"a\" level=\"b"',
        "a=b": '"a=b"',
        "a b\\": r'"a b\\"',
        'a"\n2027 INFO x': r'"a\"\n2027 INFO x"',
    }.items(),
)
def test_a_value_cannot_pass_for_another_pair_or_another_line(lines: io.StringIO, value: str, shown: str) -> None:
    log.warning("said", extra={"tunnel": value})
    assert lines.getvalue().split(" said ", 1)[1] == f"tunnel={shown}\n"


def test_a_message_cannot_make_a_second_line(lines: io.StringIO) -> None:
    log.warning("no such tunnel: %s", "x\r\n2027-01-15T08:00:00Z INFO uplink all is well")
    assert lines.getvalue().count("\n") == 1
    assert r"x\r\n2027" in lines.getvalue()


def test_an_exceptions_text_cannot_pass_for_a_line(lines: io.StringIO) -> None:
    try:
        raise ValueError("x\n2027-01-15T08:00:00Z INFO uplink all is well\x1b[2J")  # noqa: TRY301
    except ValueError:
        log.exception("a report was not taken")
    first, *rest = lines.getvalue().splitlines()
    assert first.endswith("ERROR uplink a report was not taken")
    assert rest
    assert all(line.startswith("  ") for line in rest)
    assert "\x1b" not in lines.getvalue()


def test_a_log_may_go_to_a_file(tmp_path: Path) -> None:
    file = tmp_path / "sentinel.log"
    open_log(file=str(file))
    logging.getLogger("vpn_sentinel.agent").info("started")
    logging.getLogger("vpn_sentinel.agent").debug("not said")
    logging.getLogger("httpx").info("GET https://api.telegram.org/bot123:SECRET/getUpdates")
    assert file.read_text().endswith(" INFO agent started\n")
    assert "SECRET" not in file.read_text()


def test_a_new_log_is_for_its_owner_alone_and_an_old_one_keeps_its_mode(tmp_path: Path) -> None:
    made, shared = tmp_path / "made.log", tmp_path / "shared.log"
    shared.touch()
    shared.chmod(0o640)
    for file in (made, shared):
        open_log(file=str(file))
        log.warning("a leak")
        logging.getLogger().handlers[0].close()
    assert [stat.S_IMODE(file.stat().st_mode) for file in (made, shared)] == [0o600, 0o640]


def test_a_log_goes_to_standard_error_otherwise(capsys: pytest.CaptureFixture[str]) -> None:
    open_log(debug=True)
    logging.getLogger("vpn_sentinel.agent").debug("thinking")
    assert capsys.readouterr().err.endswith(" DEBUG agent thinking\n")
    assert sys.stderr is not None


def test_a_quiet_log_leaves_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    open_log(quiet=True)
    log.info("seen")
    log.warning("broken")
    assert capsys.readouterr().err.endswith(" WARNING uplink broken\n")
    open_log(debug=True, quiet=True)
    log.debug("looked for")
    assert "DEBUG" in capsys.readouterr().err


def test_a_log_that_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        open_log(file=str(tmp_path / "none" / "sentinel.log"))


def test_a_log_that_cannot_be_written_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    open_log(file="/dev/full")
    for _ in range(3):
        log.warning("a leak")
    assert capsys.readouterr().err == "vpn-sentinel: the log cannot be written: No space left on device\n"
