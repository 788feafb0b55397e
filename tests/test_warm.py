"""A process that forked from one with PyTorch imported is as one that was started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import warm

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ([sys.executable], warm.python())


def run(*arguments: str, **options) -> list[tuple[int, str, str]]:
    """The exit status and what was written, of a process that was started and of one that forked."""
    options = {"capture_output": True, "text": True, **options}
    ended = [subprocess.run([*command, *arguments], **options) for command in COMMANDS]
    return [(one.returncode, one.stdout, one.stderr) for one in ended]


def test_arguments_folder_streams_environment_and_status_are_those_of_a_new_process(tmp_path):
    (tmp_path / "beside.py").write_text("word = 'beside'\n")
    (tmp_path / "program.py").write_text(
        "import os, sys, beside\n"
        "sys.stdout.reconfigure(errors='backslashreplace')\n"
        "print(sys.argv, os.getcwd(), os.environ, __name__, beside.word, sys.stdin.read())\n"
        "sys.exit('no')\n"
    )
    environment = {"PYTHONPATH": str(ROOT), "SAID": "é"}
    options = {"cwd": tmp_path, "env": environment, "input": "read"}
    code = "import os, sys; print(sys.argv, os.getcwd()); sys.exit(3)"
    for arguments in (["program.py", "a", ""], ["-m", "program", "a"], ["-c", code, "b"], ["-c", "1 / 0"]):
        new, forked = run(*arguments, **options)
        assert forked[:2] == new[:2] and forked[2].splitlines()[-1:] == new[2].splitlines()[-1:]


def test_only_libraries_are_imported_before(tmp_path):
    code = "import sys; print(*{'torch', 'diffusers', 'escd'} & sys.modules.keys())"
    new, forked = run("-c", code)
    assert new == (0, "\n", "")
    if warm.python() != [sys.executable]:
        assert set(forked[1].split()) == {"torch", "diffusers"}
    new, forked = run("-c", "import escd; print(escd.__file__)", env={"PYTHONPATH": str(ROOT)})
    assert forked == new


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_signals_reach_it():
    waits = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    for number in (signal.SIGTERM, signal.SIGKILL):
        for command in COMMANDS:
            process = subprocess.Popen([*command, "-c", waits], stdout=subprocess.PIPE, text=True)
            pid = int(process.stdout.readline())
            process.send_signal(number)
            assert process.wait() == -number
            process.stdout.close()
            end = time.monotonic() + 30
            while alive(pid) and time.monotonic() < end:
                time.sleep(0.01)
            assert not alive(pid)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
