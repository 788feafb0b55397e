"""How commands end that can be started again at any time."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

# A shell may have had signals ignored, as nohup does.
WORKING = """
import signal, sys, time
for each in (signal.SIGINT, signal.SIGHUP):
    signal.signal(each, signal.default_int_handler)
from escd.ending import run_command
def main():
    print("begun", flush=True)
    time.sleep(60)
run_command(main)
"""


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated"), (signal.SIGHUP, 129, "hung")],
)
def test_a_command_that_is_told_to_end_says_so_in_one_line(number, code, word):
    command = [sys.executable, "-c", WORKING]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as running:
        assert running.stdout.readline() == "begun\n"
        running.send_signal(number)
        said = running.stderr.read()
    assert running.returncode == code
    assert said.strip().startswith(word) and "Traceback" not in said and len(said.strip().splitlines()) == 1


def test_every_command_of_the_package_ends_so():
    package = Path(__file__).parents[1] / "escd"
    commands = [path for path in package.rglob("*.py") if '__name__ == "__main__"' in path.read_text()]
    assert len(commands) > 5
    for path in commands:
        last = path.read_text().rstrip().splitlines()[-1].strip()
        assert last in ("run_command(main)", "sys.exit(main())"), path.name
