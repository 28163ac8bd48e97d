"""A certificate and its key: what is wrong with them is said, and which of the two it is."""

import ssl
import subprocess
from pathlib import Path

import pytest

from tests.conftest import NEEDS_OPENSSL
from vpn_sentinel.cli.main import main
from vpn_sentinel.runtime.pem import PairError, try_pair

pytestmark = NEEDS_OPENSSL


def openssl(folder: Path, words: str) -> None:
    subprocess.run(["openssl", *words.split()], cwd=folder, check=True, capture_output=True, timeout=60)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pem")
    for name in ("a", "b"):
        openssl(
            folder,
            "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes "
            f"-keyout {name}.key -out {name}.pem -subj /CN={name}",
        )
    openssl(folder, "pkey -in a.key -aes256 -passout pass:hush -out encrypted.key")
    openssl(folder, "ec -in a.key -aes256 -passout pass:hush -out older.key")
    openssl(folder, "x509 -in a.pem -outform der -out a.der")
    openssl(folder, "pkey -in a.key -outform der -out key.der")
    for name in ("a.pem", "a.key"):
        (folder / f"cut-{name}").write_bytes((folder / name).read_bytes()[:100])
    return folder


WRONG = {
    "of another": ("a.pem", "b.key", "TLS_CERT_PATH", "do not belong together"),
    "with a passphrase": ("a.pem", "encrypted.key", "TLS_KEY_PATH", "is encrypted with a passphrase"),
    "with a passphrase in the older form": ("a.pem", "older.key", "TLS_KEY_PATH", "is encrypted with a passphrase"),
    "exchanged": ("a.key", "a.pem", "TLS_CERT_PATH", "holds no certificate (PEM)"),
    "no key": ("a.pem", "b.pem", "TLS_KEY_PATH", "holds no private key (PEM)"),
    "a binary certificate": ("a.der", "a.key", "TLS_CERT_PATH", "`openssl x509 -inform der` makes that"),
    "a binary key": ("a.pem", "key.der", "TLS_KEY_PATH", "`openssl pkey -inform der` makes that"),
    "half a certificate": ("cut-a.pem", "a.key", "TLS_CERT_PATH", "is damaged"),
    "half a key": ("a.pem", "cut-a.key", "TLS_KEY_PATH", "is damaged"),
}


@pytest.mark.parametrize(("cert", "key", "name", "said"), WRONG.values(), ids=WRONG.keys())
def test_a_server_says_what_is_wrong_with_its_certificate(
    cert: str, key: str, name: str, said: str, files: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("VPN_SENTINEL_TLS_CERT_PATH", str(files / cert))
    monkeypatch.setenv("VPN_SENTINEL_TLS_KEY_PATH", str(files / key))
    assert main(["server"]) == 1
    found = capfd.readouterr().err
    assert found.startswith(f"vpn-sentinel: VPN_SENTINEL_{name}: {files}/")
    assert said in found
    assert "_ssl.c" not in found
    assert found.count("\n") == 1


@pytest.mark.parametrize(("cert", "key", "name", "said"), WRONG.values(), ids=WRONG.keys())
def test_of_the_databases_certificate_the_same_is_said(
    cert: str, key: str, name: str, said: str, files: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    url = f"postgresql://db/n?sslcert={files / cert}&sslkey={files / key}"
    monkeypatch.setenv("VPN_SENTINEL_DATABASE_URL", url)
    assert main(["server"]) == 1
    found = capfd.readouterr().err
    word = "sslkey" if name == "TLS_KEY_PATH" else "sslcert"
    assert found.startswith(f"vpn-sentinel: VPN_SENTINEL_DATABASE_URL: {word} in the address: {files}/")
    assert said in found


@pytest.mark.parametrize("key", ["encrypted.key", "older.key"])
def test_a_passphrase_is_taken_and_another_is_told(key: str, files: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try_pair(context, files / "a.pem", files / key, "hush")
    with pytest.raises(PairError, match="encrypted with another passphrase") as told:
        try_pair(context, files / "a.pem", files / key, "loud")
    assert told.value.of_key
