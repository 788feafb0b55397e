"""One run, one frozen config, one JSON line: the only place the numbers of the paper come from.

A run is described by a frozen dataclass; the sha256 of the fields that are not at their defaults is its key.
`get` returns the stored record, or runs and appends one to `figures/records/<kind>.jsonl`, where the kind is
the config's type: `StudyConfig` is kept in `study.jsonl`, in whatever module it is defined. A record stores
every field, and its key is made again when it is read: a config may gain fields that have a default, and
defaults may change, without a record being lost or taken for another. Records never hold a path of the
machine that made them.
"""

from __future__ import annotations

import builtins
import dataclasses
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
LOCK = ".lock"  # in the records' folder, held by whoever adds to it
PACKAGES = ("torch", "diffusers", "open_clip_torch", "transformers", "escd")


@dataclasses.dataclass(frozen=True)
class Record:
    """One finished run: what was asked (`config`), what came out (`metrics`) and where it was run."""

    kind: str
    key: str  # sha256 of kind and config, but for the fields at their defaults
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


def sha256(data: bytes | str | os.PathLike | np.ndarray | torch.Tensor) -> str:
    """sha256 of a file or folder (given as a path), of bytes, or of an array's shape, type and contents.

    A folder's is that of the names and contents of its weights and configs (safetensors, json) but for
    `training.json`, the account of how they came about.
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
        if file.name != "training.json":
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
    """The stored record of `config`; where there is none, `run(config)` makes its metrics and it is appended.

    `inputs` maps names to sha256 (weights, references): a stored record made from other inputs is out of date
    and does not count. `device` is where `run` computes; None is the one `load_backbone` chooses by itself.
    `again`: run and append even where one is stored, as a measurement of speed wants; the newest counts.
    `learnt` is called after `run` and tells what the record says of the customizations that were scored.
    Raises KeyError where nothing is stored and there is no `run`; TypeError for a config that is not a frozen
    dataclass or whose values are not of their types.
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
    """The configs for which no record is stored that was made from the inputs `inputs(config)`."""
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
    """The metrics of running a benchmark now, whatever is stored; kept as a record if a folder is given."""
    if folder is None:
        return run(config)
    return get(config, run, device=device, folder=folder, again=True).metrics


def all(kind: str | type, *, folder: Path | None = None) -> list[Record]:
    """The newest record of every config of a kind, in the order first run.

    With the config's class, keys and configs are those the class gives now; with its name, as stored.
    """
    folder = FOLDER if folder is None else folder
    newest: dict[str, Record] = {}
    for record in _read(folder, kind):
        newest[record.key] = record
    return list(newest.values())


def config_of(record: Record, config_class: type) -> Any:
    """The frozen config a record was made from; a field it does not have is at its default.

    Raises TypeError for an unknown or mistyped field, and for a missing one that has no default.
    """
    config = rebuild(record.config, config_class, config_class.__name__)
    if key_of(config) != record.key:
        raise ValueError(f"a {record.kind} record's key is not that of its config: {config}")
    return config


def same_platform(record: Record, device: torch.device | str | None = None) -> bool:
    """Whether this process would give the record's bits: machine, instructions, threads, versions."""
    here = platform_of(device)
    return builtins.all(getattr(record, name) == value for name, value in here.items())


def differences(
    record: Record, metrics: Mapping[str, Any], tolerance: Mapping[str, float] | None = None
) -> list[str]:
    """What differs between a record's metrics and those of a second run, one line each; empty: none.

    Without `tolerance` to the bit. With it, a number may differ by `tolerance[name]` (its absolute bound;
    inside a list or mapping that of the metric which holds it; without a bound nothing is compared).
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
    """git HEAD of the clone, with "-dirty" where the package differs from it; None without one."""
    if shutil.which("git") is None or not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], stdout=subprocess.PIPE, text=True, check=True
        ).stdout.strip()

    if not git("rev-list", "--all", "--max-count=1"):  # nothing committed yet
        return None
    # Only the package is asked for: a study appends to figures/records while it runs.
    return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", "escd") else "")


def now() -> str:
    """The date and the time in UTC, as a record says them."""
    return datetime.now(UTC).isoformat(timespec="seconds")


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
    """What decides a number's bits besides config, inputs and code."""
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
    """Every finished line of a kind's file; with a config's class, as that class is now."""
    path = folder / f"{kind if isinstance(kind, str) else kind_of(kind)}.jsonl"
    if not path.exists():
        return []
    return _parse(path.read_bytes(), kind)


def _parse(text: bytes, kind: str | type) -> list[Record]:
    """Records of a file's text; ValueError names the line that is not one."""
    config_class, kind = (None, kind) if isinstance(kind, str) else (kind, kind_of(kind))
    names = {field.name for field in dataclasses.fields(Record)}
    newer = {"date", "learnt"}  # which the oldest records do not have
    parsed = []
    # What follows the last newline is no whole line: the next append removes it.
    for number, line in enumerate(text.split(b"\n")[:-1], start=1):
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
        parsed.append(Record(**fields))
    return parsed


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
    """Append one line; where another process was quicker, its record is returned.

    The file is written anew under a lock, whole or not at all, so that nobody has to wait to read it.
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
