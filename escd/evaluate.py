"""`python -m escd.evaluate`: scores a folder of a person's own subjects (`escd.evaluation.benchmark`)."""

from __future__ import annotations

from .ending import run_command

if __name__ == "__main__":
    run_command("escd.evaluation.benchmark")
