"""Atomic writing of files.

A file is written in a temporary folder beside its place and renamed when it is complete. After a full disk
or a killed process, and for other readers and writers, there is the old file or the new one, never a part of
one. The next writer removes temporary folders that a killed process left behind.
"""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

import psutil
from safetensors import SafetensorError, safe_open

DAY = 24 * 3600  # seconds after which unfinished files of another machine are removed
UNFINISHED = re.compile(r"\.escd-([0-9a-f]{8})-(\d+)-[0-9a-f]{8}")  # machine, process, any
NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES}


@contextmanager
def whole(path: str | Path, *, overwrite: bool = True) -> Iterator[Path]:
    """A temporary path of the same name; its file replaces `path` when the block ends without an error.

    A new file has the mode of the umask, an existing one keeps its mode. Without `overwrite`, raises
    FileExistsError when there is a file at `path` by then. Raises OSError for a path that cannot be written.
    """
    path = _regular(path)
    with _beside(path.parent) as scratch:
        unfinished = scratch / path.name
        yield unfinished
        _settle(unfinished, path, scratch)
        if overwrite:
            os.replace(unfinished, path)
        else:
            _link(unfinished, path)


@contextmanager
def together(folder: str | Path) -> Iterator[Path]:
    """A temporary folder; when the block ends without an error, its files move to `folder`.

    `folder` is created if missing. Files move only when all are written; files that refer to others (JSON,
    and files in higher folders) move last.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _beside(folder) as scratch:
        yield scratch
        written = [path.relative_to(scratch) for path in scratch.rglob("*") if path.is_file()]
        for name in written:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            _settle(scratch / name, folder / name, scratch)
        for name in sorted(written, key=lambda each: (-len(each.parts), each.suffix == ".json", each)):
            os.replace(scratch / name, folder / name)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8 atomically."""
    with whole(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def require_writable(path: str | Path, size: int = 0) -> None:
    """Raise OSError if a file of `size` bytes cannot be written: a check before long work."""
    named, path = Path(path), _regular(path)
    if os.path.exists(path) and not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, "the file there may not be changed", str(named))
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {named.parent} to write {named.name} to")
    _try(path.parent, path.name, named)
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise OSError(
            errno.ENOSPC,
            f"{size / 1e6:.1f} MB are to be written where {free / 1e6:.1f} MB are free",
            str(named),
        )


def require_folder(folder: Path) -> None:
    """Raise OSError if no files can be written to a folder, which need not exist yet."""
    there = next((each for each in (folder, *folder.parents) if os.path.exists(each)), folder)
    if not os.path.isdir(there):
        raise NotADirectoryError(f"{there} is no folder to write to")
    _try(there, "file", folder)


def save_unused(path: Path, save: Callable[[Path], object]) -> Path:
    """Write to the first unused name of `path`, `path`-2, `path`-3, ...; returns it."""
    for candidate in _numbered(path):
        if os.path.lexists(candidate):
            continue
        try:
            with whole(candidate, overwrite=False) as unfinished:
                save(unfinished)
        except FileExistsError:  # another writer was quicker
            continue
        return candidate


def save_elsewhere(path: Path, save: Callable[[Path], object]) -> Path:
    """Save a result whose `path` cannot be written under another name, and return that.

    Tries the same folder, the current one, the home folder and the one for temporary files, each with the
    file's own name and with a short one. Raises the last OSError if all of them fail.
    """
    folders = (path.parent, Path("."), Path(os.path.expanduser("~")), Path(tempfile.gettempdir()))
    for folder in dict.fromkeys(folders):
        for name in (path.name, f"escd-result{path.suffix}"):
            try:
                return save_unused(folder / name, save)
            except OSError as error:
                failed = error
    raise failed


@contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """A temporary folder in `folder`, named after this process, while the block is open."""
    _sweep(folder)
    scratch = folder / f".escd-{_machine()}-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        scratch.mkdir()
    except OSError as error:
        error.filename = str(folder)  # the caller's name for it
        raise
    try:
        yield scratch
    except SafetensorError as error:  # not an OSError, even for a full disk
        raise OSError(f"cannot write to {folder}: {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)  # the next writer removes the rest


def _try(folder: Path, name: str, named: Path) -> None:
    """Create an empty file of that name in a temporary folder; OSError if the system refuses it."""
    try:
        with _beside(folder) as scratch:
            (scratch / name).touch()
    except OSError as error:
        raise OSError(error.errno, f"nothing can be written there: {error.strerror}", str(named)) from error


def _machine() -> str:
    """Eight hex digits for the machine and, on Linux, the container: the scope of process numbers."""
    space = Path("/proc/self/ns/pid")
    processes = os.readlink(space) if space.is_symlink() else ""
    return hashlib.sha256(f"{platform.node()} {processes}".encode()).hexdigest()[:8]


def _sweep(folder: Path) -> None:
    """Remove the temporary folders of processes that no longer run."""
    for left in folder.glob(".escd-*"):
        if (name := UNFINISHED.fullmatch(left.name)) and _stale(left, name[1], int(name[2])):
            shutil.rmtree(left, ignore_errors=True)  # another process may be removing it as well


def _stale(left: Path, machine: str, process: int) -> bool:
    if machine == _machine():
        return not psutil.pid_exists(process)
    with suppress(FileNotFoundError):  # finished in the meantime
        return time.time() - left.stat().st_mtime > DAY
    return False


def _regular(path: str | Path) -> Path:
    """The file behind a path and its links; OSError for a folder, a device or a pipe."""
    real = Path(os.path.realpath(path))
    if os.path.isdir(real):  # unlike Path's methods these raise nothing, such as for a name that is too long
        raise IsADirectoryError(errno.EISDIR, "this is a folder: name a file in it", str(path))
    if os.path.exists(real) and not os.path.isfile(real):
        raise OSError(errno.EINVAL, "this is a device or a pipe, not a file that can be replaced", str(path))
    return real


def _settle(unfinished: Path, path: Path, scratch: Path) -> None:
    """Flush a finished file to the disk and set its mode, before it gets its name."""
    with unfinished.open("r+b") as file:
        os.fsync(file.fileno())
    # safetensors writes files of mode 0600; the scratch folder has the mode of the umask.
    try:
        mode = path.stat().st_mode & 0o777
    except FileNotFoundError:
        mode = scratch.stat().st_mode & 0o666
    with suppress(PermissionError):  # a file system without modes
        unfinished.chmod(mode)


def _link(unfinished: Path, path: Path) -> None:
    """Give a finished file its name; FileExistsError if the name is taken."""
    try:
        os.link(unfinished, path)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        if path.exists():  # without links, two simultaneous writers are not detected
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from error
        os.replace(unfinished, path)


def _numbered(path: Path) -> Iterator[Path]:
    yield path
    for number in count(2):
        yield path.with_name(f"{path.stem}-{number}{path.suffix}")


@contextmanager
def open_safetensors(path: str | Path) -> Iterator[safe_open]:
    """A safetensors file, open for reading; ValueError for another or an incomplete file."""
    try:
        with safe_open(path, "pt") as stored:
            yield stored
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
