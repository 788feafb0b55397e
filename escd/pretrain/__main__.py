"""`python -m escd.pretrain`: train `mini`, or filters for another backbone (`escd.pretrain.command`)."""

from __future__ import annotations

from ..ending import run_command

if __name__ == "__main__":
    run_command("escd.pretrain.command")
