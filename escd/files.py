"""One way to write a file: whole or not at all.

What is written goes to a folder of its own beside the file and takes the file's place when it is finished. A
reader, a second writer, a full disk and a killed process find the old file or the new one, never half of one.
A folder that a killed process left behind is removed by the next writer there.
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

DAY = 24 * 3600  # seconds after which the unfinished files of another machine are given up
UNFINISHED = re.compile(r"\.escd-([0-9a-f]{8})-(\d+)-[0-9a-f]{8}")  # machine, process, any
NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES}


@contextmanager
def whole(path: str | Path, *, overwrite: bool = True) -> Iterator[Path]:
    """A path of the same name to write to; what is there becomes `path` when the block ends well.

    A new file has the mode that the umask gives, an old one keeps its own. Without `overwrite`,
    FileExistsError is raised when there is a file at `path` by then. Raises OSError for a path that cannot be
    written.
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
    """A folder to write to; when the block ends well, its files move to `folder`, which is made if need be.

    Nothing moves before all of it is written. Each file is replaced at once, those that name other files
    (JSON, and what lies higher) last.
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
    """Write a text file in UTF-8, whole or not at all."""
    with whole(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def require_writable(path: str | Path, size: int = 0) -> None:
    """Raise OSError where a file of `size` bytes cannot be written: to ask before the work for it is done."""
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
    """Raise OSError where no files can be written to a folder, which need not be there yet."""
    there = next((each for each in (folder, *folder.parents) if os.path.exists(each)), folder)
    if not os.path.isdir(there):
        raise NotADirectoryError(f"{there} is no folder to write to")
    _try(there, "file", folder)


def save_unused(path: Path, save: Callable[[Path], object]) -> Path:
    """Write the first of the names `path`, `path`-2, `path`-3, ... that no file has; returns it."""
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
    """Write what could not be written to `path` under a name that works, and return that.

    Tried are the same folder, the current one, the home folder and the one for temporary files, each with the
    file's own name and with a short one. Raises the last OSError when none of them works.
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
    """A new folder inside `folder`, named after this process, for as long as the block is open."""
    _sweep(folder)
    scratch = folder / f".escd-{_machine()}-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        scratch.mkdir()
    except OSError as error:
        error.filename = str(folder)  # the name that the caller knows
        raise
    try:
        yield scratch
    except SafetensorError as error:  # which is no OSError, whatever the disk said
        raise OSError(f"cannot write to {folder}: {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)  # what cannot be removed now is swept later


def _try(folder: Path, name: str, named: Path) -> None:
    """Make an empty file of that name beside the files of a folder: the system itself says what it takes."""
    try:
        with _beside(folder) as scratch:
            (scratch / name).touch()
    except OSError as error:
        raise OSError(error.errno, f"nothing can be written there: {error.strerror}", str(named)) from error


def _machine() -> str:
    """Eight digits for the machine, and on Linux for the container: where a process's number means one."""
    space = Path("/proc/self/ns/pid")
    processes = os.readlink(space) if space.is_symlink() else ""
    return hashlib.sha256(f"{platform.node()} {processes}".encode()).hexdigest()[:8]


def _sweep(folder: Path) -> None:
    """Remove what processes that no longer run have left unfinished in a folder."""
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
    """Give a finished file the mode it is to have, and have the disk hold it before it gets its name."""
    with unfinished.open("r+b") as file:
        os.fsync(file.fileno())
    # What safetensors writes has mode 0600; the scratch folder was made under the umask.
    try:
        mode = path.stat().st_mode & 0o777
    except FileNotFoundError:
        mode = scratch.stat().st_mode & 0o666
    with suppress(PermissionError):  # a file system without modes
        unfinished.chmod(mode)


def _link(unfinished: Path, path: Path) -> None:
    """Give a finished file its name, unless that is taken."""
    try:
        os.link(unfinished, path)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        if path.exists():  # a file system without links: two writers at once cannot be told apart
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from error
        os.replace(unfinished, path)


def _numbered(path: Path) -> Iterator[Path]:
    yield path
    for number in count(2):
        yield path.with_name(f"{path.stem}-{number}{path.suffix}")


@contextmanager
def open_safetensors(path: str | Path) -> Iterator[safe_open]:
    """A safetensors file, open for reading; ValueError when it is none, or is cut short."""
    try:
        with safe_open(path, "pt") as stored:
            yield stored
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
