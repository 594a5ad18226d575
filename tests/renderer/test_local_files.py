"""`file:` URLs end here: nothing outside the folder is read, and nothing that is not a file is opened for long."""

import os
from pathlib import Path

import pytest

from renderer.local_files import ForbiddenFileError, open_below, read_below, size_below

LIMIT = 1000


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with a picture, beside a secret."""
    folder = tmp_path / "root"
    (folder / "inner").mkdir(parents=True)
    (folder / "picture").write_bytes(b"picture")
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "root-beside").mkdir()
    (tmp_path / "root-beside" / "secret").write_bytes(b"secret")
    return folder


def test_a_file_below_the_root_is_read(root: Path) -> None:
    assert read_below(root, f"{root}/picture", LIMIT) == b"picture"
    assert read_below(root, f"{root}/inner/../picture", LIMIT) == b"picture"


def test_the_size_of_a_file_below_the_root_is_told_and_of_no_other(root: Path) -> None:
    assert size_below(root, f"{root}/picture") == len(b"picture")
    os.truncate(root / "picture", 2**40)
    assert size_below(root, f"{root}/picture") == 2**40
    for path in (f"{root}/../secret", f"{root}/inner", "/etc/passwd"):
        with pytest.raises(ForbiddenFileError):
            size_below(root, path)


def test_no_more_is_read_than_the_limit(root: Path) -> None:
    assert read_below(root, f"{root}/picture", 3) == b"pic"


@pytest.mark.parametrize(
    "path",
    [
        "{root}/../secret",
        "{root}/inner/../../secret",
        "{root}/../root-beside/secret",
        "{root}-beside/secret",
        "{root}/../absent",
        "/etc/passwd",
        "/proc/self/environ",
        "/",
        "picture",
        "",
        "{root}/picture\0.png",
    ],
)
def test_a_path_that_leads_out_of_the_root_is_forbidden_whether_it_exists_or_not(root: Path, path: str) -> None:
    with pytest.raises(ForbiddenFileError):
        read_below(root, path.format(root=root), LIMIT)


def test_a_link_that_leads_out_of_the_root_is_forbidden(root: Path) -> None:
    (root / "file-link").symlink_to(root.parent / "secret")
    (root / "folder-link").symlink_to(root.parent)
    (root / "dangling").symlink_to(root.parent / "absent")
    (root / "chain").symlink_to("file-link")
    for path in ("file-link", "folder-link/secret", "dangling", "chain", "inner/../folder-link/secret"):
        with pytest.raises(ForbiddenFileError):
            read_below(root, f"{root}/{path}", LIMIT)


def test_a_link_within_the_root_is_followed(root: Path) -> None:
    (root / "inner" / "link").symlink_to("../picture")
    assert read_below(root, f"{root}/inner/link", LIMIT) == b"picture"


def test_the_root_itself_may_be_reached_through_a_link(root: Path) -> None:
    (root.parent / "alias").symlink_to(root)
    assert read_below(root.parent / "alias", f"{root.parent}/alias/picture", LIMIT) == b"picture"


def test_a_link_put_in_place_after_the_path_was_resolved_is_not_followed(root: Path) -> None:
    (root / "file-link").symlink_to(root.parent / "secret")
    (root / "folder-link").symlink_to(root.parent)
    for parts in (["file-link"], ["folder-link", "secret"]):
        with pytest.raises(OSError, match=r"Too many levels of symbolic links|Not a directory"):
            open_below(str(root), parts)


def test_a_folder_a_pipe_and_a_device_are_forbidden(root: Path) -> None:
    os.mkfifo(root / "pipe")
    for path in (root, root / "inner", root / "pipe"):
        with pytest.raises(ForbiddenFileError):
            read_below(root, str(path), LIMIT)
    with pytest.raises(ForbiddenFileError):
        read_below(Path("/dev"), "/dev/zero", LIMIT)


@pytest.mark.parametrize("path", ["absent", "absent/picture", "picture/inner", "loop"])
def test_a_file_that_is_not_there_cannot_be_read(root: Path, path: str) -> None:
    (root / "loop").symlink_to("loop")
    with pytest.raises(OSError, match=r"\[Errno"):
        read_below(root, f"{root}/{path}", LIMIT)


def test_no_descriptor_is_left_open(root: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for path in ("picture", "inner", "absent/picture", "../secret"):
        try:
            read_below(root, f"{root}/{path}", LIMIT)
        except (ForbiddenFileError, OSError):
            continue
    assert len(os.listdir("/proc/self/fd")) == before
