"""How commands end that can be started again at any time."""

import os
import re
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


ROOT = Path(__file__).resolve().parents[1]
RUN = "import runpy; runpy.run_module('{}', run_name='__main__')"


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
        block = path.read_text().partition('if __name__ == "__main__":\n')[2].splitlines()[0].strip()
        assert re.match(r'run_command\((main|"[\w.]+")\)', block), path.name


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("module", ["escd", "escd.study", "escd.draw"])
def test_an_interrupt_while_torch_is_imported_is_one_line(module, tmp_path):
    # A module in torch's place that says when it is being imported, and takes its time.
    (tmp_path / "torch.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    pipe = subprocess.PIPE
    handled = "import signal; signal.signal(2, signal.default_int_handler)"
    command = [sys.executable, "-c", f"{handled}\n{RUN.format(module)}"]
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment) as running:
        assert running.stdout.readline() == "importing\n"
        running.send_signal(signal.SIGINT)
        said = running.stderr.read()
    assert running.returncode == 130
    assert said.strip().startswith("interrupted") and len(said.strip().splitlines()) == 1
