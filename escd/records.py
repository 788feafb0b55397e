"""Records: one run, one frozen config, one JSON line. All numbers of the paper come from records.

A frozen dataclass describes a run; the sha256 of its fields that are not at their defaults is its key. `get`
returns the stored record, or runs and appends one to `figures/records/<kind>.jsonl`. The kind is the class of
the config, in any module: `StudyConfig` is stored in `study.jsonl`. A record stores every field, and its key
is computed again when it is read. So a config may gain fields that have a default, and defaults may change;
old records stay valid. Records contain no paths of a machine.
"""

from __future__ import annotations

import builtins
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock

from .files import whole
from .frozen import as_json, as_plain, rebuild, with_defaults, without_defaults
from .paths import ROOT

FOLDER = ROOT / "figures" / "records"
LOCK = ".lock"  # in the records' folder, held while a record is added
PACKAGES = ("torch", "diffusers", "open_clip_torch", "transformers", "escd")


@dataclasses.dataclass(frozen=True)
class Record:
    """One finished run: its config, its metrics, and the platform it ran on."""

    kind: str
    key: str  # sha256 of kind and config, without fields at their defaults
    config: dict[str, Any]
    seed: int | None
    metrics: dict[str, Any]
    inputs: dict[str, str]  # name of an input -> its sha256
    seconds: float
    device: str
    machine: str  # system, architecture and processor
    instruction_set: str
    threads: int
    versions: dict[str, str | None]
    commit: str | None  # git HEAD, "-dirty" appended when the package differs from it; None outside git
    # When the run ended, in UTC; None in records older than this field.
    date: str | None = None
    # By attribute, how the scored customization was learnt (`evaluation.kept.About`): date, commit, steps,
    # seconds, sha256, and whether it was kept from an earlier run.
    learnt: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)


def kind_of(config: Any) -> str:
    """The name of a config's (or config class's) file: `StudyConfig` -> "study"."""
    name = (config if isinstance(config, type) else type(config)).__name__.removesuffix("Config")
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def key_of(config: Any) -> str:
    """sha256 over the kind and the fields that are not at their defaults.

    Raises TypeError for a field whose value is not of its type.
    """
    return _key(as_json(config), type(config))


def _key(config: Mapping[str, Any], config_class: type) -> str:
    chosen = without_defaults(config, config_class)
    text = json.dumps([kind_of(config_class), chosen], sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def sha256(data: bytes | str | os.PathLike | np.ndarray | torch.Tensor, without: str | None = None) -> str:
    """sha256 of a file or folder (given as a path), of bytes, or of an array's shape, type and contents.

    For a folder: over the names and contents of its weights and configs (safetensors, json), without
    `training.json`, which describes their training, and without its subfolder `without`.
    """
    if isinstance(data, bytes):
        return hashlib.sha256(data).hexdigest()
    if isinstance(data, torch.Tensor):
        data = data.detach().cpu().numpy()
    if isinstance(data, np.ndarray):
        digest = hashlib.sha256(f"{data.shape}{data.dtype.str}".encode())
        digest.update(np.ascontiguousarray(data).tobytes())
        return digest.hexdigest()
    path = Path(data)
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for file in sorted([*path.rglob("*.safetensors"), *path.rglob("*.json")]):
        if file.name != "training.json" and file.relative_to(path).parts[0] != without:
            digest.update(f"{file.relative_to(path).as_posix()} {sha256(file)}\n".encode())
    return digest.hexdigest()


def get(
    config: Any,
    run: Callable[[Any], Mapping[str, Any]] | None = None,
    *,
    inputs: Mapping[str, str] | None = None,
    device: torch.device | str | None = None,
    folder: Path | None = None,
    again: bool = False,
    learnt: Callable[[], Mapping[str, Mapping[str, Any]]] | None = None,
) -> Record:
    """The stored record of `config`; where there is none, `run(config)` gives its metrics and it is stored.

    inputs: names and sha256 of inputs (weights, references); a record of other inputs is out of date and
    ignored. device: where `run` computes; None is the default of `load_backbone`. again: run and append even
    where a record is stored, for measurements of speed; the newest counts. learnt: called after `run`,
    returns `Record.learnt`. Raises KeyError where nothing is stored and `run` is None; TypeError for a config
    that is not a frozen dataclass or whose values are not of their types.
    """
    folder = FOLDER if folder is None else folder
    key = key_of(config)
    stored = _find(_read(folder, type(config)), key, inputs)
    if stored is not None and not again:
        return stored
    if run is None:
        raise KeyError(f"figures/records has no {kind_of(config)} record of {config}: `make study` makes it")
    start = time.perf_counter()
    metrics = run(config)
    seconds = time.perf_counter() - start
    about = learnt() if learnt is not None else {}
    return _append(folder, config, key, metrics, inputs, seconds, device, again, about)


def missing(
    configs: Sequence[Any], inputs: Callable[[Any], Mapping[str, str]], *, folder: Path | None = None
) -> list[Any]:
    """The configs without a stored record of the inputs that `inputs(config)` returns."""
    folder = FOLDER if folder is None else folder
    stored = {
        kind: {(record.key, frozenset(record.inputs.items())) for record in _read(folder, kind)}
        for kind in {type(config) for config in configs}
    }
    return [c for c in configs if (key_of(c), frozenset(inputs(c).items())) not in stored[type(c)]]


def measured(
    config: Any,
    run: Callable[[Any], Mapping[str, Any]],
    *,
    device: torch.device | str | None = None,
    folder: Path | None = None,
) -> Mapping[str, Any]:
    """Run a benchmark now, even if it is stored, and return its metrics; with a folder, store a record."""
    if folder is None:
        return run(config)
    return get(config, run, device=device, folder=folder, again=True).metrics


def all(kind: str | type, *, folder: Path | None = None) -> list[Record]:
    """The newest record of every config of a kind, in the order first run.

    With the config's class, keys and configs are as the class defines them now; with its name, as stored.
    """
    folder = FOLDER if folder is None else folder
    newest: dict[str, Record] = {}
    for record in _read(folder, kind):
        newest[record.key] = record
    return list(newest.values())


def config_of(record: Record, config_class: type) -> Any:
    """The frozen config of a record; fields that the record does not have are at their defaults.

    Raises TypeError for an unknown or mistyped field, and for a missing one that has no default.
    """
    config = rebuild(record.config, config_class, config_class.__name__)
    if key_of(config) != record.key:
        raise ValueError(f"a {record.kind} record's key is not that of its config: {config}")
    return config


def same_platform(record: Record, device: torch.device | str | None = None) -> bool:
    """Whether this process has the record's platform: machine, instructions, threads, versions."""
    here = platform_of(device)
    return builtins.all(getattr(record, name) == value for name, value in here.items())


def differences(
    record: Record, metrics: Mapping[str, Any], tolerance: Mapping[str, float] | None = None
) -> list[str]:
    """The differences between a record's metrics and those of a second run, one line each.

    Without `tolerance`, metrics must be equal to the bit. With it, the numbers in the metric `name` may
    differ by `tolerance[name]`, an absolute bound; a metric without a bound is not compared.
    """
    fresh = as_plain(metrics, "metrics")
    lines = [f"{name}: only in one of the two" for name in sorted(record.metrics.keys() ^ fresh.keys())]
    for name in sorted(record.metrics.keys() & fresh.keys()):
        bound = 0.0 if tolerance is None else tolerance.get(name, math.inf)
        if not _close(record.metrics[name], fresh[name], bound):
            lines.append(
                f"{name}: {record.metrics[name]} is stored, {fresh[name]} came out (bound {bound:g})"
            )
    return lines


def commit(root: Path = ROOT) -> str | None:
    """git HEAD of the clone, with "-dirty" if the package differs from it; None outside a clone."""
    if shutil.which("git") is None or not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], stdout=subprocess.PIPE, text=True, check=True
        ).stdout.strip()

    if not git("rev-list", "--all", "--max-count=1"):  # nothing committed yet
        return None
    # Only the package is checked, because a study changes figures/records while it runs.
    return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", "escd") else "")


def now() -> str:
    """Date and time in UTC, in the format of records."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@functools.cache
def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages a number depends on; None for one that is not installed."""
    installed: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # escd itself, run from a bare source tree
            installed[name] = None
    return installed


def _close(one: Any, other: Any, bound: float) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and builtins.all(
            _close(one[name], other[name], bound) for name in one
        )
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and builtins.all(
            _close(a, b, bound) for a, b in zip(one, other, strict=True)
        )
    numbers = (int, float)
    if isinstance(one, numbers) and isinstance(other, numbers) and bool not in (type(one), type(other)):
        return abs(one - other) <= bound
    return one == other or bound == math.inf


def platform_of(device: torch.device | str | None) -> dict[str, Any]:
    """What determines the bits of a result besides config, inputs and code."""
    if device is None:
        device = (
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    device = torch.device(device)
    cpuinfo = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "machine": " ".join([platform.system(), platform.machine(), *(models[:1] or [platform.processor()])]),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def _read(folder: Path, kind: str | type) -> list[Record]:
    """All finished lines of a kind's file; with a config's class, as that class defines them now."""
    path = folder / f"{kind if isinstance(kind, str) else kind_of(kind)}.jsonl"
    if not path.exists():
        return []
    return _parse(path.read_bytes(), kind)


def _parse(text: bytes, kind: str | type) -> list[Record]:
    """The records of a file's text; ValueError names a line that is not a record."""
    # Text after the last newline is an unfinished line; the next append removes it.
    return [_record_of(line, kind, number) for number, line in enumerate(text.split(b"\n")[:-1], start=1)]


# A file is read whenever one of its records is asked for, and a line never changes. All who ask for a record
# share it: its dicts are for reading.
@functools.lru_cache(maxsize=1 << 14)
def _record_of(line: bytes, kind: str | type, number: int) -> Record:
    """The record in a line of a file; ValueError, with the line's number, for one that is not a record."""
    config_class, kind = (None, kind) if isinstance(kind, str) else (kind, kind_of(kind))
    names = {field.name for field in dataclasses.fields(Record)}
    newer = {"date", "learnt"}  # missing in the oldest records
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        error.add_note(f"in figures/records/{kind}.jsonl, line {number}")
        raise
    if not isinstance(fields, dict) or fields.keys() | newer != names or fields["kind"] != kind:
        odd = sorted((fields.keys() | newer) ^ names) if isinstance(fields, dict) else line[:40]
        raise ValueError(f"{kind}.jsonl, line {number}, is not a {kind} record: {odd or fields['kind']}")
    if config_class is not None:
        fields["config"] = with_defaults(fields["config"], config_class)
        fields["key"] = _key(fields["config"], config_class)
    return Record(**fields)


def _find(stored: list[Record], key: str, inputs: Mapping[str, str] | None) -> Record | None:
    for record in reversed(stored):
        if record.key == key and (inputs is None or record.inputs == dict(inputs)):
            return record
    return None


def _append(
    folder: Path,
    config: Any,
    key: str,
    metrics: Mapping[str, Any],
    inputs: Mapping[str, str] | None,
    seconds: float,
    device: torch.device | str | None,
    again: bool,
    learnt: Mapping[str, Mapping[str, Any]],
) -> Record:
    """Append one line; if another process has stored the config meanwhile, return its record.

    The file is replaced as a whole, under a lock, so readers need no lock.
    """
    record = Record(
        kind=kind_of(config),
        key=key,
        config=as_json(config),
        seed=getattr(config, "seed", None),
        metrics=as_plain(metrics, "metrics"),
        inputs=as_plain(inputs or {}, "inputs"),
        seconds=round(seconds, 3),
        commit=commit(),
        date=now(),
        learnt=as_plain(learnt, "learnt"),
        **platform_of(device),
    )
    line = (json.dumps(dataclasses.asdict(record), ensure_ascii=False, allow_nan=False) + "\n").encode()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{record.kind}.jsonl"
    with FileLock(folder / LOCK):
        text = path.read_bytes() if path.exists() else b""
        stored = _find(_parse(text, type(config)), key, inputs)
        if stored is not None and not again:
            return stored
        with whole(path) as unfinished:
            unfinished.write_bytes(text[: text.rfind(b"\n") + 1] + line)
    return record
