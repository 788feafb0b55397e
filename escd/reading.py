"""Reading of untrusted JSON: ValueError names the file or field that is not JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def json_of(text: str | bytes, where: str) -> Any:
    """The value of a JSON text; ValueError, beginning with `where`, for text that is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # RecursionError: too deeply nested
        raise ValueError(f"{where} is not JSON: {error}") from error


def read_object(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file; ValueError, with the file's name, for other content."""
    content = json_of(Path(path).read_bytes(), str(path))
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object with named entries")
    return content
