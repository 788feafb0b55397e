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
import types
import typing
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from filelock import FileLock

from .files import whole

ROOT = Path(__file__).resolve().parents[1]  # the clone: figures, notebooks and paper stand beside the package
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
    # Of each customization that was scored (`escd.kept.About`): when, at which commit, in how many steps and
    # seconds it was learnt, whether it was kept from an earlier run, and the sha256 of what was scored.
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
    said = _without_defaults(config, config_class)
    text = json.dumps([kind_of(config_class), said], sort_keys=True, allow_nan=False)
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
    config = _rebuild(record.config, config_class, config_class.__name__)
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
    fresh = _plain(metrics, "metrics")
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
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # escd itself, run from a bare source tree
            found[name] = None
    return found


def as_json(config: Any) -> dict[str, Any]:
    """A frozen config as JSON values, each checked against its field's type."""
    frozen = dataclasses.is_dataclass(config) and config.__dataclass_params__.frozen
    if not frozen or isinstance(config, type):
        raise TypeError(f"a run is described by an instance of a frozen dataclass, not by {config!r}")
    hints = typing.get_type_hints(type(config))
    return {
        field.name: _checked(
            getattr(config, field.name), hints[field.name], f"{type(config).__name__}.{field.name}"
        )
        for field in dataclasses.fields(config)
    }


# --------------------------------------------------------------------------------
# config values


def _checked(value: Any, hint: Any, where: str) -> Any:
    """`value` as JSON when it is of type `hint`; TypeError otherwise."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for choice in arguments:
            if _is(value, choice):
                return _checked(value, choice, where)
    elif _is(value, hint):
        if origin is tuple:
            hints = [arguments[0]] * len(value) if arguments[1:] == (...,) else arguments
            return [
                _checked(item, each, f"{where}[{i}]")
                for i, (item, each) in enumerate(zip(value, hints, strict=True))
            ]
        if dataclasses.is_dataclass(hint):
            return as_json(value)
        return _no_path(float(value) if hint is float else value, where)
    raise TypeError(f"{where} is {value!r}, which is not of type {getattr(hint, '__name__', hint)}")


def _is(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_is(value, choice) for choice in arguments)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in arguments)
    if origin is tuple:
        return isinstance(value, tuple) and (arguments[1:] == (...,) or len(value) == len(arguments))
    if hint is None or hint is type(None):
        return value is None
    if hint is float:  # 1 and 1.0 are the same number, and get the same key
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, str) or dataclasses.is_dataclass(hint):
        return isinstance(value, hint)
    raise TypeError(
        f"a config field may not be of type {hint}: use bool, int, float, str, Literal, tuple, "
        "None, or a frozen dataclass of those"
    )


def _rebuild(value: Any, hint: Any, where: str) -> Any:
    """The inverse of `_checked`: lists become tuples, mappings frozen dataclasses."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        rest = [choice for choice in arguments if choice is not type(None)]
        return _rebuild(value, rest[0], where) if len(rest) == 1 else value
    if origin is tuple and isinstance(value, list):
        hints = [arguments[0]] * len(value) if arguments[1:] == (...,) else arguments
        return tuple(_rebuild(item, each, where) for item, each in zip(value, hints, strict=True))
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        hints, defaults = _fields(hint)
        names = {field.name for field in dataclasses.fields(hint)}
        wrong = (value.keys() - names) | (names - value.keys() - defaults.keys())
        if wrong:
            raise TypeError(f"{where}: unknown or missing fields {sorted(wrong)}")
        return hint(**{name: _rebuild(item, hints[name], f"{where}.{name}") for name, item in value.items()})
    return value


@functools.cache
def _fields(config_class: type) -> tuple[dict[str, Any], dict[str, Any]]:
    """The types of a config's fields, and the defaults, as JSON values, of those that have one."""
    hints, found = typing.get_type_hints(config_class), {}
    for field in dataclasses.fields(config_class):
        where = f"{config_class.__name__}.{field.name}"
        if field.default is not dataclasses.MISSING:
            found[field.name] = _checked(field.default, hints[field.name], where)
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = _checked(field.default_factory(), hints[field.name], where)
    return hints, found


def _without_defaults(config: Mapping[str, Any], config_class: type) -> dict[str, Any]:
    """A config's JSON without the fields that are at their defaults; in nested configs likewise."""
    hints, defaults = _fields(config_class)
    return {
        name: _nested(value, hints.get(name), _without_defaults)
        for name, value in config.items()
        if name not in defaults or json.dumps(value) != json.dumps(defaults[name])  # 1 is not 1.0 or True
    }


def _with_defaults(config: Mapping[str, Any], config_class: type) -> dict[str, Any]:
    """A stored config's JSON with the fields that its class has gained since; in nested configs likewise."""
    hints, defaults = _fields(config_class)
    stored = {name: _nested(value, hints.get(name), _with_defaults) for name, value in config.items()}
    return stored | {name: value for name, value in defaults.items() if name not in stored}


def _nested(value: Any, hint: Any, change: Callable[[Mapping[str, Any], type], dict[str, Any]]) -> Any:
    """`value` with `change` made to each config of class `hint` in it."""
    arguments = typing.get_args(hint)
    if isinstance(value, dict):
        classes = [choice for choice in (hint, *arguments) if dataclasses.is_dataclass(choice)]
        return change(value, classes[0]) if len(classes) == 1 else value
    if isinstance(value, list) and typing.get_origin(hint) is tuple:
        hints = [arguments[0]] * len(value) if arguments[1:] == (...,) else arguments
        return [_nested(item, each, change) for item, each in zip(value, hints, strict=True)]
    return value


def _no_path(value: Any, where: str) -> Any:
    if isinstance(value, str) and (os.path.isabs(value) or re.match(r"^(~|[A-Za-z]:\\)", value)):
        raise ValueError(
            f"{where} is a path of this machine ({value!r}): a record names its inputs by sha256"
        )
    return value


def _plain(value: Any, where: str) -> Any:
    """Metrics as JSON values: scalars of numpy and torch become numbers; not-a-number is refused."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item, f"{where}.{name}") for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        return _plain(value.tolist(), where)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}: store None where a score is undefined")
    if value is None or isinstance(value, (bool, int, float, str)):
        return _no_path(value, where)
    raise TypeError(f"{where} is a {type(value).__name__}, which a record cannot hold")


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


# --------------------------------------------------------------------------------
# files


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
    found = []
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
            fields["config"] = _with_defaults(fields["config"], config_class)
            fields["key"] = _key(fields["config"], config_class)
        found.append(Record(**fields))
    return found


def _find(found: list[Record], key: str, inputs: Mapping[str, str] | None) -> Record | None:
    for record in reversed(found):
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
        metrics=_plain(metrics, "metrics"),
        inputs=_plain(inputs or {}, "inputs"),
        seconds=round(seconds, 3),
        commit=commit(),
        date=now(),
        learnt=_plain(learnt, "learnt"),
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
