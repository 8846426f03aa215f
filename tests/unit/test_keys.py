"""The key files of the token channel: how they are made, and when they are refused."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import zmq

from deploy.local.keys import main
from workers.keys import KeyFileBad, WorkerKeys, read_public, read_secret

if TYPE_CHECKING:
    from collections.abc import Callable

TOP = Path(__file__).parents[2]
# Always the same, as their tests' names are made of it.
SECRET = b"JTKVSB%%)wK0E.X)V>+}o?pNmC{O&4W4b!Ni{Lh6"
PUBLIC = zmq.curve_public(SECRET)
NAMES = ("worker.secret", "worker.public", "router.secret", "router.public")
READERS = [read_secret, read_public]


def key_file(folder: Path, content: bytes, mode: int = 0o600) -> Path:
    file = folder / "a.key"
    file.write_bytes(content)
    file.chmod(mode)
    return file


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_made_keys_are_pairs_and_secrets_are_their_owners_alone(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        assert main(["make", str(tmp_path / "a" / "keys")]) == 0
    finally:
        os.umask(before)
    folder = tmp_path / "a" / "keys"
    assert sorted(f.name for f in folder.iterdir()) == sorted(NAMES)
    for whose in ("worker", "router"):
        secret = read_secret(folder / f"{whose}.secret")
        assert read_public(folder / f"{whose}.public") == (zmq.curve_public(secret),)
        assert stat.S_IMODE((folder / f"{whose}.secret").stat().st_mode) == 0o600
    assert read_secret(folder / "worker.secret") != read_secret(folder / "router.secret")


def test_what_it_prints_are_the_four_settings_and_no_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["make", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    settings = dict(line.split("=", 1) for line in told.splitlines())
    assert sorted(settings.values()) == sorted(str(tmp_path / name) for name in NAMES)
    for name in NAMES:
        assert (tmp_path / name).read_text().strip() not in told


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("link", [False, True])
def test_no_key_is_replaced_and_none_is_made_beside_one_that_is_there(
    tmp_path: Path, name: str, link: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    if link:
        (tmp_path / name).symlink_to(tmp_path / "elsewhere")
    else:
        (tmp_path / name).write_bytes(b"mine")
    assert main(["make", str(tmp_path)]) == 1
    assert [f.name for f in tmp_path.iterdir()] == [name]
    assert link or (tmp_path / name).read_bytes() == b"mine"
    told = capsys.readouterr().err
    assert str(tmp_path / name) in told
    assert told.count("\n") == 1


def test_a_folder_that_can_not_be_is_told_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main(["make", str(tmp_path / "file")]) == 1
    assert str(tmp_path / "file") in capsys.readouterr().err


@pytest.mark.parametrize("read", READERS)
def test_a_key_is_read_with_or_without_a_line_end(
    tmp_path: Path, read: Callable[[Path], object]
) -> None:
    for end in (b"", b"\n", b"\r\n", b"\n\n"):
        assert read(key_file(tmp_path, SECRET + end)) in (SECRET, (SECRET,))


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\n", SECRET[:-1], SECRET + b"x", SECRET[:-1] + b" ", SECRET[:-1] + b"~", b"#" * 40,
        b"\xff" * 40, b"\0" * 40, SECRET + b"\n" + b"x" * 39, b"x" * 100_000, b"\n" * 100_000,
    ],
)  # fmt: skip
@pytest.mark.parametrize("read", READERS)
def test_what_is_no_key_is_refused_by_the_files_name_and_without_its_content(
    tmp_path: Path, read: Callable[[Path], object], content: bytes
) -> None:
    file = key_file(tmp_path, content)
    with pytest.raises(KeyFileBad) as refused:
        read(file)
    assert str(file) in str(refused.value)
    assert "\n" not in str(refused.value)
    for line in content.split():
        assert repr(line)[2:-1] not in str(refused.value).replace(str(file), "")


@pytest.mark.parametrize("read", READERS)
def test_a_file_that_is_not_there_or_can_not_be_read_is_refused(
    tmp_path: Path, read: Callable[[Path], object]
) -> None:
    for bad in (tmp_path / "none", tmp_path, Path(), Path("x" * 5000)):
        with pytest.raises(KeyFileBad, match="key file"):
            read(bad)


@pytest.mark.parametrize("mode", [0o604, 0o644, 0o602, 0o601, 0o666])
def test_a_secret_that_others_may_touch_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(KeyFileBad, match=f"{mode:04o}"):
        read_secret(key_file(tmp_path, SECRET, mode))


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o640, 0o440])
def test_a_secret_of_its_owner_and_group_is_fine(tmp_path: Path, mode: int) -> None:
    """A group may read it: that is how Kubernetes hands a secret to a process that is not root."""
    assert read_secret(key_file(tmp_path, SECRET, mode)) == SECRET


def test_a_public_key_may_be_read_by_all_and_written_by_few(tmp_path: Path) -> None:
    assert read_public(key_file(tmp_path, PUBLIC, 0o644)) == (PUBLIC,)
    with pytest.raises(KeyFileBad, match="0646"):
        read_public(key_file(tmp_path, PUBLIC, 0o646))


def test_a_file_has_one_secret_and_any_number_of_routers(tmp_path: Path) -> None:
    file = key_file(tmp_path, PUBLIC + b"\n\n" + SECRET + b"\n")
    assert read_public(file) == (PUBLIC, SECRET)
    with pytest.raises(KeyFileBad, match="one secret key"):
        read_secret(file)


def test_a_secret_does_not_show_when_keys_are_printed() -> None:
    from router.link import Curve

    shown = repr(WorkerKeys(SECRET, frozenset())) + repr(Curve(PUBLIC, SECRET, PUBLIC))
    assert SECRET.decode() not in shown


@pytest.mark.parametrize(
    ("process", "flags"),
    [
        ("worker", ["--role", "mixed", "--engine", "sim", "--curve-routers-file"]),
        ("router", ["--workers", "tcp://127.0.0.1:1", "--curve-workers-file"]),
    ],
)
def test_a_process_with_a_bad_key_file_ends_at_once_with_one_line(
    tmp_path: Path, process: str, flags: list[str]
) -> None:
    assert main(["make", str(tmp_path)]) == 0
    secret, public = tmp_path / f"{process}.secret", tmp_path / f"{process}.public"
    secret.chmod(0o644)
    ended = subprocess.run(
        [
            sys.executable, "-m", "tandem", process, "--model", "m", *flags, str(public),
            "--curve-secret-file", str(secret),
        ],
        cwd=TOP, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert ended.returncode == 1
    assert len(ended.stderr.splitlines()) == 1
    assert ended.stderr.startswith(f"tandem {process}: key file {secret}: its mode 0644")
