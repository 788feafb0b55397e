"""`python -m escd.study`: makes the missing records of the study (`escd.evaluation.study_command`)."""

from __future__ import annotations

from .ending import run_command

if __name__ == "__main__":
    run_command("escd.evaluation.study_command")
