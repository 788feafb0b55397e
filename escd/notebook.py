"""What a notebook shows a person instead of a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def in_one_line() -> Iterator[None]:
    """An error about a user's files is still raised, and shown as one line by IPython.

    The line says which folder paths start from: a notebook's is not always the one that it lies in.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        line = f"{' '.join(str(error).split())} (paths start from {Path.cwd()})"
        error._render_traceback_ = lambda: [line]  # which IPython asks for
        raise
