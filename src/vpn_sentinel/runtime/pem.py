"""Certificates and keys in PEM files (RFC 7468): whether OpenSSL accepts them, and if not, why."""

import os
import ssl
from pathlib import Path
from typing import Final

_CERTIFICATE_BEGINS: Final = (b"-----BEGIN CERTIFICATE-----", b"-----BEGIN TRUSTED CERTIFICATE-----")
_KEY_MARK: Final = b"PRIVATE KEY-----"
# PKCS #8 (RFC 5958), and OpenSSL's older form (RFC 1421).
_ENCRYPTED_MARKS: Final = (b"-----BEGIN ENCRYPTED PRIVATE KEY-----", b"Proc-Type: 4,ENCRYPTED")
_MAX_PEM_BYTES: Final = 1_000_000  # that are read


class PairError(ValueError):
    """A certificate and its key that cannot be used. `of_key`: the key is wrong, not the certificate."""

    def __init__(self, problem: str, *, of_key: bool) -> None:
        super().__init__(problem)
        self.of_key = of_key


def try_pair(context: ssl.SSLContext, cert: str | os.PathLike[str], key: str | os.PathLike[str], secret: str) -> None:
    """Load them into `context`; `secret` is the key's passphrase, "" for none. Raises PairError."""
    content = _read(cert, of_key=False)
    if not any(mark in content for mark in _CERTIFICATE_BEGINS):
        raise PairError(f"{cert} holds no certificate (PEM){_der_hint(content, 'x509')}", of_key=False)
    content = _read(key, of_key=True)
    if _KEY_MARK not in content:
        raise PairError(f"{key} holds no private key (PEM){_der_hint(content, 'pkey')}", of_key=True)
    encrypted = any(mark in content for mark in _ENCRYPTED_MARKS)
    if encrypted and not secret:
        remedy = f"`openssl pkey -in {key} -out PLAIN` writes it without"
        raise PairError(f"{key} is encrypted with a passphrase, for which nobody is asked: {remedy}", of_key=True)
    try:
        context.load_cert_chain(cert, key, password=lambda: secret)
    except ssl.SSLError as e:
        raise _pair_error(e, cert, key, encrypted=encrypted) from e
    except OSError as e:
        raise PairError(f"{cert}: {e.strerror}", of_key=False) from e


def _pair_error(error: ssl.SSLError, cert: str | os.PathLike[str], key: object, *, encrypted: bool) -> PairError:
    reason = (error.reason or "").replace("_", " ").lower()
    if "mismatch" in reason:
        return PairError(f"{cert} and {key} do not belong together: the key is of another certificate", of_key=False)
    if reason and "lib" not in reason:  # "PEM lib" and the like explain nothing
        return PairError(f"{cert} with {key} is refused by OpenSSL: {reason}", of_key=False)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cert)
    except OSError:  # ssl.SSLError is one
        return PairError(f"{cert} is damaged: a certificate begins in it, and cannot be read", of_key=False)
    if encrypted:
        return PairError(f"{key} is encrypted with another passphrase, or damaged", of_key=True)
    return PairError(f"{key} is damaged: a private key begins in it, and cannot be read", of_key=True)


def _read(path: str | os.PathLike[str], *, of_key: bool) -> bytes:
    try:
        with Path(path).open("rb") as file:
            return file.read(_MAX_PEM_BYTES)
    except OSError as e:
        raise PairError(f"{path}: {e.strerror}", of_key=of_key) from e


def _der_hint(content: bytes, command: str) -> str:
    """A hint where the file may be in the binary form, DER, which begins with a SEQUENCE (ITU-T X.690)."""
    return f"; `openssl {command} -inform der` makes that of DER" if content.startswith(b"0") else ""
