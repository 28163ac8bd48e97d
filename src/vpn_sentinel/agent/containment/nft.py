"""Run nftables commands: by libnftables inside this process, or by the program `nft` where the library is missing.

The library takes about a millisecond, a started `nft` 20 to 40. It is loaded when it is first needed: it costs about
3 MB, which an agent that never contains does not pay.
"""

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from typing import Any, Final

LIBRARY: Final = "libnftables.so.1"
_NFT_TIMEOUT_S: Final = 5.0
_SEARCH_PATH: Final = "/usr/sbin:/sbin:/usr/local/sbin:/usr/bin:/bin:/usr/local/bin"
_MAX_ERROR_CHARS: Final = 300
Nft = Callable[[str], Awaitable[None]]


class NftError(OSError):
    """nftables is not available, or refused the commands."""


class Library:
    """libnftables(3) through ctypes. Its context belongs to the network namespace that it was made in."""

    def __init__(self, name: str = LIBRARY) -> None:
        """Raises NftError where the library is missing."""
        import ctypes

        try:
            self._lib: Any = ctypes.CDLL(name)
        except OSError as e:
            raise NftError(f"{name} is missing") from e
        self._lib.nft_ctx_new.restype = ctypes.c_void_p
        self._lib.nft_ctx_new.argtypes = [ctypes.c_uint32]
        for call in (self._lib.nft_ctx_buffer_error, self._lib.nft_ctx_buffer_output):
            call.argtypes = [ctypes.c_void_p]
        self._lib.nft_ctx_get_error_buffer.argtypes = [ctypes.c_void_p]
        self._lib.nft_ctx_get_error_buffer.restype = ctypes.c_char_p
        self._lib.nft_run_cmd_from_buffer.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
        self._context = self._lib.nft_ctx_new(0)
        if not self._context:
            raise NftError(f"{name} gives no context")
        self._lib.nft_ctx_buffer_error(self._context)

    def run(self, commands: str) -> None:
        """Run `commands` as one transaction. Raises NftError."""
        if self._lib.nft_run_cmd_from_buffer(self._context, commands.encode()) != 0:
            error = self._lib.nft_ctx_get_error_buffer(self._context) or b""
            raise NftError(first_line(error))


class Nftables:
    """An `Nft`: the library at first use, else the program."""

    def __init__(self, library: str = LIBRARY, path: str = _SEARCH_PATH) -> None:
        self._name = library
        self._path = path
        self._library: Library | None = None

    async def __call__(self, commands: str) -> None:
        """Run `commands` as one transaction. Raises NftError."""
        if self._library is None:
            try:
                self._library = Library(self._name)
            except NftError as e:
                program = shutil.which("nft", path=self._path)
                if program is None:
                    raise NftError(f"neither {self._name} nor the program nft is here: install nftables") from e
                await _spawn(program, commands)
                return
        self._library.run(commands)


async def _spawn(program: str, commands: str) -> None:
    try:
        process = await asyncio.create_subprocess_exec(
            program, "-f", "-", stdin=-1, stdout=asyncio.subprocess.DEVNULL, stderr=-1
        )
    except OSError as e:
        raise NftError(f"{program}: {e.strerror}") from e
    try:
        async with asyncio.timeout(_NFT_TIMEOUT_S):
            _, error = await process.communicate(commands.encode())
    except TimeoutError as e:
        raise NftError(f"nft did not end within {_NFT_TIMEOUT_S:g} s") from e
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        raise NftError(first_line(error))


def first_line(error: bytes) -> str:
    lines = error.decode("utf-8", "replace").strip().splitlines()
    return (lines[0] if lines else "nftables refused and gave no reason")[:_MAX_ERROR_CHARS]
