"""Downloads to disk: streamed, bounded in size and time, and without passing credentials on.

The standard library's client, which honours `https_proxy`; the agent itself never loads it.
"""

import base64
import hashlib
import http.client
import ssl
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPMessage
from pathlib import Path
from typing import IO, Any, Final

from vpn_sentinel.agent.geo.store import GeoError, writing
from vpn_sentinel.agent.net.http import reason
from vpn_sentinel.runtime.clock import Clock
from vpn_sentinel.runtime.secret import Secret

_PIECE: Final = 256 * 1024
Progress = Callable[[int, int | None], None]  # bytes so far, and in all when that is known


class NotThereError(GeoError):
    """The server has no such file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """`download` and `unpacked` are bytes of one file; `silence` and `whole` seconds of one download."""

    download: int = 512 * 1024 * 1024
    unpacked: int = 1024 * 1024 * 1024
    silence: float = 30.0
    whole: float = 1800.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DownloadLogin:
    account: str
    key: Secret

    def header(self) -> str:
        return "Basic " + base64.b64encode(f"{self.account}:{self.key.reveal()}".encode()).decode()


class _Redirects(urllib.request.HTTPRedirectHandler):
    max_redirections = 5

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        # The login is an "unredirected" header, so it stays with the address that it was meant for.
        if req.full_url.startswith("https:") and not newurl.startswith("https:"):
            fp.close()
            raise GeoError(f"{shown(req.full_url)}: leads from HTTPS to an unprotected address")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class Web:
    """Fetches files over HTTP and HTTPS."""

    def __init__(self, tls: ssl.SSLContext, clock: Clock, *, bounds: Bounds, progress: Progress | None = None) -> None:
        self.bounds = bounds
        self._clock = clock
        self._progress = progress
        self._opener = urllib.request.OpenerDirector()  # without file:, ftp: and data:
        for handler in (
            urllib.request.ProxyHandler(),
            urllib.request.HTTPHandler(),
            urllib.request.HTTPSHandler(context=tls),
            urllib.request.HTTPDefaultErrorHandler(),
            urllib.request.HTTPErrorProcessor(),
            _Redirects(),
        ):
            self._opener.add_handler(handler)

    def save(self, url: str, to: Path, login: DownloadLogin | None = None) -> str:
        """Download to a new file; returns its SHA-256. Raises GeoError, NotThereError for a 404."""
        digest = hashlib.sha256()
        with writing(to) as file:

            def write(piece: bytes) -> None:
                digest.update(piece)
                try:
                    file.write(piece)
                except OSError as e:  # the disk's fault, not the network's
                    raise GeoError(f"{to.parent}: {e.strerror}") from e

            self._read(url, login, self.bounds.download, write, self._progress)
        return digest.hexdigest()

    def text(self, url: str, login: DownloadLogin | None = None) -> str:
        """A short text. Raises GeoError."""
        found = bytearray()
        self._read(url, login, 64 * 1024, found.extend, None)
        return found.decode("utf-8", "replace")

    def _read(
        self,
        url: str,
        login: DownloadLogin | None,
        most: int,
        write: Callable[[bytes], object],
        progress: Progress | None,
    ) -> None:
        request = urllib.request.Request(url, headers={"User-Agent": "vpn-sentinel"})  # noqa: S310 - checked settings
        if login is not None:
            request.add_unredirected_header("Authorization", login.header())
        began = self._clock.boottime()
        try:
            with self._opener.open(request, timeout=self.bounds.silence) as response:
                self._copy(response, most, write, progress, began)
        except urllib.error.HTTPError as e:
            with e:
                raise _refusal(url, e.code, login) from None
        except GeoError as e:
            raise e if str(e).startswith(shown(url)) else GeoError(f"{shown(url)}: {e}") from None
        except urllib.error.URLError as e:
            why = reason(e.reason) if isinstance(e.reason, BaseException) else "no answer"
            raise GeoError(f"{shown(url)}: {why}") from None
        except TimeoutError:
            raise GeoError(f"{shown(url)}: nothing came for {self.bounds.silence:g} s") from None
        except http.client.IncompleteRead:
            raise GeoError(f"{shown(url)}: the connection ended early") from None
        except (http.client.HTTPException, ValueError):
            # Their texts may repeat what the other side wrote, a signed address among it.
            raise GeoError(f"{shown(url)}: the answer is not usable HTTP") from None
        except OSError as e:
            raise GeoError(f"{shown(url)}: {reason(e)}") from None

    def _copy(
        self, response: Any, most: int, write: Callable[[bytes], object], progress: Progress | None, began: float
    ) -> None:
        length = response.headers.get("Content-Length") or ""
        whole = int(length) if length.isascii() and length.isdigit() else None
        if whole is not None and whole > most:
            raise GeoError(f"is larger than {most} bytes")
        got = 0
        while piece := response.read(_PIECE):
            got += len(piece)
            if got > most:
                raise GeoError(f"is larger than {most} bytes")
            if self._clock.boottime() - began > self.bounds.whole:
                raise GeoError(f"is not complete after {self.bounds.whole:g} s")
            write(piece)
            if progress is not None:
                progress(got, whole)
        if whole is not None and got != whole:
            raise GeoError(f"the connection ended after {got} of {whole} bytes")


def shown(url: str) -> str:
    """An address without its query, which may hold a signature."""
    return url.partition("?")[0]


def _refusal(url: str, status: int, login: DownloadLogin | None) -> GeoError:
    if status == 404:
        return NotThereError(f"{shown(url)}: is not there (HTTP 404)")
    if status in (401, 403) and login is not None:
        return GeoError(f"{shown(url)}: does not accept this account and key (HTTP {status})")
    if status == 429:
        return GeoError(f"{shown(url)}: too many downloads for today (HTTP 429)")
    return GeoError(f"{shown(url)}: HTTP {status}")


def terminal_progress() -> Progress | None:
    """Shows megabytes on standard error while somebody looks at it, None when nobody does."""
    if not sys.stderr.isatty():
        return None

    def show(got: int, whole: int | None) -> None:
        of = f" of {whole / 1e6:.1f}" if whole else ""
        end = "\n" if got == whole else ""
        sys.stderr.write(f"\r  {got / 1e6:.1f}{of} MB{end}")
        sys.stderr.flush()

    return show
