"""Reading JSON that a stranger may have written: ValueError says which file or field is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def json_of(text: str | bytes, where: str) -> Any:
    """The value a JSON text holds; ValueError, beginning with `where`, for a text that is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # the second: brackets too many to follow
        raise ValueError(f"{where} is not JSON: {error}") from error


def read_object(path: str | Path) -> dict[str, Any]:
    """The JSON object that a file holds; ValueError, with the file's name, for another content."""
    content = json_of(Path(path).read_bytes(), str(path))
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object with named entries")
    return content
