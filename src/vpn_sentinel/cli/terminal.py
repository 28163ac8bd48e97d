"""Lines for people: coloured and wrapped by words on a terminal, plain and unwrapped anywhere else."""

import shutil
import sys
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TextIO

from vpn_sentinel.cli.output import printable
from vpn_sentinel.runtime.settings import environment

# SGR parameters of ECMA-48.
_COLOURS: Final = {"red": "31", "green": "32", "yellow": "33", "magenta": "35"}
_STYLES: Final = {"bold": "1", "dim": "2", **_COLOURS}
_MIN_TEXT_COLUMNS: Final = 24  # a narrower text column is hard to read: the text is indented less then
_SMALL_INDENT: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Terminal:
    """What standard output can show.

    `columns` is where lines are wrapped, None where they stay whole; `styles` are the words that have an effect;
    `encoding` decides which characters can be printed.
    """

    columns: int | None = None
    styles: Mapping[str, str]
    encoding: str = "utf-8"

    def line(self, text: str = "", style: str = "", *, lead: Sequence[tuple[str, str]] = (), indent: int = 0) -> None:
        """Print `lead`, as (text, style), then `text`, whose further lines are indented by `indent` columns.

        Control characters are printed as escapes, since a terminal would obey them.
        """
        begins = sum(_columns(printable(word)) for word, _ in lead)
        rest = self._fitting_indent(indent or begins)
        first, *more = self._wrapped(printable(text), begins, rest)
        print("".join(self._styled(printable(word), how) for word, how in lead) + self._styled(first, style))
        for part in more:
            print(" " * rest + self._styled(part, style))

    def command(self, text: str, *, indent: int) -> None:
        """Print a line that may hold a command to copy.

        It is wrapped by spaces up to the terminal's edge, not by line breaks, which would run half of a pasted command.
        """
        rest = self._fitting_indent(indent)
        first, *more = self._wrapped(printable(text), indent, rest)
        line = " " * indent + first
        for part in more:
            line += " " * (-_columns(line) % (self.columns or 1) + rest) + part
        print(line)

    def table(self, rows: Sequence[tuple[str, str]]) -> None:
        """Print names and values in two columns."""
        width = max((len(name) for name, _ in rows), default=0)
        for name, value in rows:
            self.line(value, lead=((name.ljust(width + 2), "dim"),))

    def printable_or(self, mark: str, plain: str) -> str:
        """`mark`, or `plain` where the output's encoding lacks it."""
        try:
            mark.encode(self.encoding)
        except UnicodeEncodeError:
            return plain
        return mark

    def _styled(self, text: str, style: str) -> str:
        codes = ";".join(self.styles[word] for word in style.split() if word in self.styles)
        return f"\x1b[{codes}m{text}\x1b[0m" if codes and text else text

    def _fitting_indent(self, indent: int) -> int:
        narrow = self.columns is not None and self.columns - indent < _MIN_TEXT_COLUMNS
        return min(indent, _SMALL_INDENT) if narrow else indent

    def _wrapped(self, text: str, begins: int, rest: int) -> Iterator[str]:
        """`text` in parts that fit: the first after `begins` columns, the others after `rest`."""
        if self.columns is None:
            yield text
            return
        part, used = "", begins
        for word in text.split(" "):
            width = _columns(word)
            if part and used + 1 + width > self.columns:
                yield part
                part, used = word, rest + width
            else:
                part, used = (f"{part} {word}", used + 1 + width) if part else (word, used + width)
        yield part


def of_stdout() -> Terminal:
    """The properties of standard output, also by the environment: NO_COLOR, FORCE_COLOR, TERM, COLUMNS."""
    return of_stream(sys.stdout, environment())


def of_stream(stream: TextIO, env: Mapping[str, str]) -> Terminal:
    """NO_COLOR (no-color.org) keeps bold and dim, TERM=dumb no style; FORCE_COLOR colours a pipe, too."""
    shown = stream.isatty()
    styles = _STYLES if (shown and env.get("TERM", "dumb") not in ("", "dumb")) or env.get("FORCE_COLOR") else {}
    if env.get("NO_COLOR"):
        styles = {name: code for name, code in styles.items() if name not in _COLOURS}
    columns = shutil.get_terminal_size().columns if shown else None
    return Terminal(columns=columns, styles=styles, encoding=stream.encoding or "utf-8")


def _columns(text: str) -> int:
    """The columns of `text` on a terminal: two for a wide character (UAX 11), none for a combining one."""
    if text.isascii():
        return len(text)
    return sum(_columns_of(character) for character in text)


def _columns_of(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
