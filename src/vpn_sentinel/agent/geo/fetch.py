"""Downloads to disk: streamed, limited in size and time, and without passing credentials on.

By the standard library's client, which honours `https_proxy`; the agent itself never loads it.
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

_CHUNK_BYTES: Final = 256 * 1024
Progress = Callable[[int, int | None], None]  # bytes so far, and in total if known


class NotThereError(GeoError):
    """The server has no such file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """`download` and `unpacked` are maximum bytes of one file. `silence` and `whole` are the maximum seconds without
    data and of one download.
    """

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
        # The login is an "unredirected" header, so it is not sent to the address of a redirect.
        if req.full_url.startswith("https:") and not newurl.startswith("https:"):
            fp.close()
            raise GeoError(f"{shown(req.full_url)}: redirects from HTTPS to plain HTTP")
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

            def write(chunk: bytes) -> None:
                digest.update(chunk)
                try:
                    file.write(chunk)
                except OSError as e:  # an error of the disk, not of the network
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
        max_bytes: int,
        write: Callable[[bytes], object],
        progress: Progress | None,
    ) -> None:
        request = urllib.request.Request(url, headers={"User-Agent": "vpn-sentinel"})  # noqa: S310 - checked settings
        if login is not None:
            request.add_unredirected_header("Authorization", login.header())
        started_at = self._clock.boottime()
        try:
            with self._opener.open(request, timeout=self.bounds.silence) as response:
                self._copy(response, max_bytes, write, progress, started_at)
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
            # Their texts may contain what the server sent, such as a signed URL.
            raise GeoError(f"{shown(url)}: the answer is not usable HTTP") from None
        except OSError as e:
            raise GeoError(f"{shown(url)}: {reason(e)}") from None

    def _copy(
        self,
        response: Any,
        max_bytes: int,
        write: Callable[[bytes], object],
        progress: Progress | None,
        started_at: float,
    ) -> None:
        length = response.headers.get("Content-Length") or ""
        total = int(length) if length.isascii() and length.isdigit() else None
        if total is not None and total > max_bytes:
            raise GeoError(f"is larger than {max_bytes} bytes")
        received = 0
        while chunk := response.read(_CHUNK_BYTES):
            received += len(chunk)
            if received > max_bytes:
                raise GeoError(f"is larger than {max_bytes} bytes")
            if self._clock.boottime() - started_at > self.bounds.whole:
                raise GeoError(f"is not complete after {self.bounds.whole:g} s")
            write(chunk)
            if progress is not None:
                progress(received, total)
        if total is not None and received != total:
            raise GeoError(f"the connection ended after {received} of {total} bytes")


def shown(url: str) -> str:
    """A URL without its query, which may have a signature."""
    return url.partition("?")[0]


def _refusal(url: str, status: int, login: DownloadLogin | None) -> GeoError:
    if status == 404:
        return NotThereError(f"{shown(url)}: does not exist (HTTP 404)")
    if status in (401, 403) and login is not None:
        return GeoError(f"{shown(url)}: does not accept this account and key (HTTP {status})")
    if status == 429:
        return GeoError(f"{shown(url)}: too many downloads for today (HTTP 429)")
    return GeoError(f"{shown(url)}: HTTP {status}")


def terminal_progress() -> Progress | None:
    """Shows megabytes on standard error; None when that is not a terminal."""
    if not sys.stderr.isatty():
        return None

    def show(received: int, total: int | None) -> None:
        of = f" of {total / 1e6:.1f}" if total else ""
        end = "\n" if received == total else ""
        sys.stderr.write(f"\r  {received / 1e6:.1f}{of} MB{end}")
        sys.stderr.flush()

    return show
