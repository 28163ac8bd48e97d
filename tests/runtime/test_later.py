"""Files that need not be there yet: what can be told of them at the start is told."""

import os
import socket
from pathlib import Path

import pytest

from vpn_sentinel.runtime.parsers import mode_later


def test_what_may_still_come_is_waited_for(tmp_path: Path) -> None:
    assert mode_later(str(tmp_path / "later")) == 0
    assert mode_later(str(tmp_path / "folder" / "later")) == 0
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "socket"))
        assert mode_later(str(tmp_path / "socket"))


def test_what_can_never_come_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "round").symlink_to(tmp_path / "round")
    for path, said in (("file/x", "Not a directory"), ("x" * 300, "File name too long"), ("round", "Too many levels")):
        with pytest.raises(ValueError, match=said):
            mode_later(str(tmp_path / path))


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user: needs root")
def test_what_others_keep_closed_is_told(tmp_path: Path) -> None:
    file = tmp_path / "port"
    file.touch(mode=0o600)
    for folder in (tmp_path, *list(tmp_path.parents)[:2]):
        folder.chmod(0o755)
    child = os.fork()
    if child == 0:
        os.setresuid(65534, 65534, 65534)
        try:
            mode_later(str(file))
        except ValueError as e:
            os._exit(3 if "Permission denied" in str(e) else 4)
        os._exit(5)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
