"""Files that are whole or not there, whatever happens while they are written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vpn_sentinel.runtime import files


def test_it_takes_the_place_of_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    path.write_text("old")
    path.chmod(0o644)
    files.write_whole(path, b"new")
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o600
    files.write_whole(path, b"public", mode=0o644)
    assert path.stat().st_mode & 0o777 == 0o644
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.write_text("theirs")
    (tmp_path / "kept").symlink_to(theirs)
    files.write_whole(tmp_path / "kept", b"ours")
    assert theirs.read_text() == "theirs"
    assert (tmp_path / "kept").read_text() == "ours"
    assert not (tmp_path / "kept").is_symlink()


@pytest.mark.parametrize("size", [0, 1, 4096, 9999])
def test_a_full_disk_leaves_the_old_one_and_nothing_else(size: int, tmp_path: Path) -> None:
    """The limit of a file's size (setrlimit(2)) ends the write in the middle, as a disk does that is full."""
    path = tmp_path / "kept"
    path.write_text("old")
    program = (
        "import resource, sys; from pathlib import Path; from vpn_sentinel.runtime import files\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))\n"
        "try: files.write_whole(Path(sys.argv[1]), b'x' * 10_000)\n"
        "except OSError: sys.exit(7)"
    )
    done = subprocess.run([sys.executable, "-B", "-c", program, path], check=False)
    assert done.returncode == 7
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]
    assert path.read_text() == "old"


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        files.write_whole(tmp_path / "none" / "x", b"x")


def test_killed_at_any_moment_it_is_the_old_or_the_new(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    path.write_bytes(b"0" * 100_000)
    program = (
        "import sys; from pathlib import Path; from vpn_sentinel.runtime import files\n"
        "for n in range(10**9):\n"
        "    print(n, flush=True); files.write_whole(Path(sys.argv[1]), b'%d' % (n % 10) * 100_000)"
    )
    for after in range(1, 30, 3):
        process = subprocess.Popen([sys.executable, "-c", program, path], stdout=subprocess.PIPE)
        assert process.stdout is not None
        with process.stdout as told:
            for _ in range(after):
                told.readline()
            process.kill()
        process.wait()
        content = path.read_bytes()
        assert len(content) == 100_000
        assert len(set(content)) == 1
    assert os.path.lexists(path)


def test_what_has_the_name_of_a_folder_is_said(tmp_path: Path) -> None:
    files.folder(tmp_path / "a" / "b")
    files.folder(tmp_path / "a" / "b")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name, why in (("file", "is no folder"), ("link", "is a link that leads nowhere")):
        with pytest.raises(NotADirectoryError, match=why):
            files.folder(tmp_path / name)
