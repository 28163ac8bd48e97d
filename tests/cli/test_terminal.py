"""What `check` and `doctor` print, on terminals of several kinds and without one."""

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from vpn_sentinel.cli.terminal import Terminal, of_stream

ADVICE = "See which route leads there (ip route show table all), and switch the kill switch on. " * 2
LONG = "198.51.100.0/24 " * 12
SHOWN = f"""
from vpn_sentinel.cli.terminal import of_stdout
t = of_stdout()
t.line("LEAKING", "bold red")
t.table([("exit", "203.0.113.4"), ("routes", {LONG.strip()!r})])
t.line({LONG.strip()!r}, lead=((t.printable_or("✗", "x") + " ip_leak  ", "red"),), indent=4)
t.command(t.printable_or("→", "->") + " " + {ADVICE.strip()!r}, indent=4)
"""


def piped(**env: str) -> bytes:
    done = subprocess.run([sys.executable, "-c", SHOWN], env=env, capture_output=True, check=True, timeout=30)
    return done.stdout


def on_terminal(columns: int, **env: str) -> str:
    main, side = pty.openpty()
    env = {"TERM": "xterm", "COLUMNS": str(columns), **env}
    with os.fdopen(main, "rb", buffering=0) as screen:
        with os.fdopen(side, "wb") as stdout:
            subprocess.run([sys.executable, "-c", SHOWN], env=env, stdout=stdout, check=True, timeout=30)
        told = b""
        while chunk := _read(screen):
            told += chunk
    return told.decode().replace("\r\n", "\n")


def _read(screen: io.FileIO) -> bytes:
    try:
        return screen.read(65536) or b""
    except OSError:  # EIO: nobody has the other end open any more (pty(7))
        return b""


def rows(told: str, columns: int) -> list[str]:
    """The lines as a terminal shows them: it goes on in a new row at its edge."""
    plain = told
    for code in ("1;31", "31", "2", "1", "0"):
        plain = plain.replace(f"\x1b[{code}m", "")
    return [line[i : i + columns].rstrip() for line in plain.splitlines() for i in range(0, max(len(line), 1), columns)]


@pytest.mark.parametrize("columns", [30, 40, 80, 200])
def test_a_terminal_of_any_width_breaks_no_word(columns: int) -> None:
    shown = rows(on_terminal(columns), columns)
    assert max(map(len, shown)) <= columns
    words = " ".join(shown).split()
    assert words == piped().decode().split()


def test_values_stand_below_one_another_in_eighty_columns() -> None:
    shown = rows(on_terminal(80), 80)
    values = [row for row in shown if row.startswith(("exit", "routes"))]
    assert [len(row) - len(row.split(maxsplit=1)[1]) for row in values] == [8, 8]
    assert shown[3].startswith("        198.51.100.0/24")


def test_a_command_that_is_copied_holds_no_line_break() -> None:
    told = on_terminal(80)
    line = told[told.index("→") :]
    assert line.count("\n") == 1
    assert "ip route show table all" in " ".join(line.split())


def test_without_a_terminal_lines_stay_whole_and_bare() -> None:
    told = piped(TERM="xterm").decode()
    assert "\x1b" not in told
    assert [len(line) > 80 for line in told.splitlines()] == [False, False, True, True, True]


def test_colours_go_where_they_are_wanted() -> None:
    assert "\x1b[1;31mLEAKING\x1b[0m" in on_terminal(80)
    assert "\x1b[1mLEAKING\x1b[0m" in on_terminal(80, NO_COLOR="1")
    assert "\x1b[1;31mLEAKING\x1b[0m" in on_terminal(80, NO_COLOR="")
    assert "\x1b" not in on_terminal(80, TERM="dumb")
    assert b"\x1b[1;31mLEAKING" in piped(FORCE_COLOR="1")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_marks_stay_apart_in_other_encodings(encoding: str) -> None:
    told = piped(PYTHONIOENCODING=encoding).decode(encoding)
    assert "x ip_leak" in told
    assert "-> See" in told


def test_wide_and_combining_characters_count_as_shown(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal(columns=30, styles={})
    terminal.line("東京 " * 8 + "e\u0301 " * 12)
    first, second, _ = capsys.readouterr().out.split("\n", 2)
    assert first == " ".join(["東京"] * 6)
    assert second == " ".join(["東京"] * 2 + ["e\u0301"] * 10)


def test_nothing_from_outside_commands_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal(columns=80, styles={})
    terminal.line("a\x1b[31m\n", lead=(("b\r", ""),))
    terminal.command("c\x07", indent=2)
    assert capsys.readouterr().out == "b\\ra\\x1b[31m\\n\n  c\\x07\n"


def test_a_file_is_no_terminal(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w", encoding="utf-8") as stream:
        terminal = of_stream(stream, {"TERM": "xterm"})
    assert (terminal.columns, dict(terminal.styles)) == (None, {})
