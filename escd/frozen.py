"""Frozen configs as plain JSON and back, each field checked against its type."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch


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


def rebuild(value: Any, hint: Any, where: str) -> Any:
    """The inverse of `_checked`: lists become tuples, mappings frozen dataclasses."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        rest = [choice for choice in arguments if choice is not type(None)]
        return rebuild(value, rest[0], where) if len(rest) == 1 else value
    if origin is tuple and isinstance(value, list):
        hints = [arguments[0]] * len(value) if arguments[1:] == (...,) else arguments
        return tuple(rebuild(item, each, where) for item, each in zip(value, hints, strict=True))
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        hints, defaults = _fields(hint)
        names = {field.name for field in dataclasses.fields(hint)}
        wrong = (value.keys() - names) | (names - value.keys() - defaults.keys())
        if wrong:
            raise TypeError(f"{where}: unknown or missing fields {sorted(wrong)}")
        return hint(**{name: rebuild(item, hints[name], f"{where}.{name}") for name, item in value.items()})
    return value


@functools.cache
def _fields(config_class: type) -> tuple[dict[str, Any], dict[str, Any]]:
    """The types of a config's fields, and their defaults, if any, as JSON values."""
    hints, defaults = typing.get_type_hints(config_class), {}
    for field in dataclasses.fields(config_class):
        where = f"{config_class.__name__}.{field.name}"
        if field.default is not dataclasses.MISSING:
            defaults[field.name] = _checked(field.default, hints[field.name], where)
        elif field.default_factory is not dataclasses.MISSING:
            defaults[field.name] = _checked(field.default_factory(), hints[field.name], where)
    return hints, defaults


def without_defaults(config: Mapping[str, Any], config_class: type) -> dict[str, Any]:
    """A config's JSON without the fields at their defaults, also in nested configs."""
    hints, defaults = _fields(config_class)
    return {
        name: _nested(value, hints.get(name), without_defaults)
        for name, value in config.items()
        if name not in defaults or json.dumps(value) != json.dumps(defaults[name])  # 1 is not 1.0 or True
    }


def with_defaults(config: Mapping[str, Any], config_class: type) -> dict[str, Any]:
    """A stored config's JSON with the fields that its class has gained since, also in nested configs."""
    hints, defaults = _fields(config_class)
    stored = {name: _nested(value, hints.get(name), with_defaults) for name, value in config.items()}
    return stored | {name: value for name, value in defaults.items() if name not in stored}


def _nested(value: Any, hint: Any, change: Callable[[Mapping[str, Any], type], dict[str, Any]]) -> Any:
    """`value` with `change` applied to each config of class `hint` in it."""
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


def as_plain(value: Any, where: str) -> Any:
    """Metrics as JSON values: numpy and torch scalars become numbers. ValueError for NaN and infinity."""
    if isinstance(value, Mapping):
        return {str(name): as_plain(item, f"{where}.{name}") for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        return as_plain(value.tolist(), where)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}: store None where a score is undefined")
    if value is None or isinstance(value, (bool, int, float, str)):
        return _no_path(value, where)
    raise TypeError(f"{where} is a {type(value).__name__}, which a record cannot hold")
