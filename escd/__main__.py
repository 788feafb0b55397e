"""`python -m escd`: customize an attribute of an image, generate with it, export it (`escd.commands`)."""

from __future__ import annotations

from .ending import run_command

if __name__ == "__main__":
    run_command("escd.commands")
