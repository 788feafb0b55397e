"""Python processes that have PyTorch imported when they begin: forks of one that imports it once.

A new process needs some ten seconds of a core to import PyTorch, diffusers and transformers. The words of
`python()` take the place of `sys.executable` in a command: what follows them (`-c CODE`, `-m MODULE` or a
file) runs as in a new process, with the same environment, folder, standard streams, signals and exit status;
`escd` itself is imported anew. For tests that are not about how a process begins: variables that are read
then (`MALLOC_...`, `OMP_...`, `PYTHONHASHSEED`) do nothing in a fork.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress

ADDRESS = "ESCD_TESTS_WARM"  # environment variable: the socket of the process that forks
PARTS = ("commands", "sliders", "evaluation.study", "paper.draw", "pretrain.command")  # import all libraries
PASSED_ON = (signal.SIGINT, signal.SIGTERM)
LENGTH = struct.Struct("!Q")


def python() -> list[str]:
    """The first words of a command that runs Python."""
    address = os.environ.get(ADDRESS)
    return [sys.executable, "-IS", __file__, address] if address else [sys.executable]


def start(folder: str) -> Callable[[], None]:
    """Start the process that forks, for this process and those it starts; a function that ends it.

    It imports nothing before it is first asked. Only on Linux: frameworks of a Mac do not survive a fork.
    """
    if sys.platform != "linux" or ADDRESS in os.environ:
        return lambda: None
    address = os.path.join(folder, "warm")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        command = [sys.executable, __file__, "serve", str(listener.fileno())]
        server = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[listener.fileno()])
    os.environ[ADDRESS] = address

    def end() -> None:
        del os.environ[ADDRESS]
        server.stdin.close()
        server.wait()

    return end


# ---- the process that forks


def serve(number: int) -> None:
    """Fork for each that asks, until standard input ends; returns in the fork, which is to run `sys.argv`."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that look after a fork
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal, to all that pytest started
    with socket.socket(fileno=number) as listener:
        while True:
            ready, _, _ = select.select([listener, 0], [], [])
            if 0 in ready:
                os._exit(0)
            asked, _ = listener.accept()
            import_libraries()
            if os.fork() == 0:
                break
            asked.close()
    look_after_fork(asked)


def import_libraries() -> None:
    """Import all that the package, its notebooks and papermill import, but leave out the package itself."""
    for name in ("ipykernel.kernelapp", "papermill.cli", "nbval.plugin", *(f"escd.{part}" for part in PARTS)):
        importlib.import_module(name)
    for name in [name for name in sys.modules if name.partition(".")[0] == "escd"]:
        del sys.modules[name]


def look_after_fork(asked: socket.socket) -> None:
    """Return in a new fork; the process itself passes signals on to it and its end back, and ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    head, streams, _, _ = socket.recv_fds(asked, LENGTH.size, 3)
    request = json.loads(receive(asked, *LENGTH.unpack(head)))
    fork = os.fork()
    if fork == 0:
        asked.close()
        begin(streams=streams, **request)
        return
    for stream in (0, 1, 2, *streams):
        os.close(stream)
    ended = os.pidfd_open(fork)
    while ended not in (ready := select.select([asked, ended], [], [])[0]):
        number = asked.recv(1) if asked in ready else b""
        os.kill(fork, number[0] if number else signal.SIGKILL)  # who asked is gone
        if not number:
            break
    _, status = os.waitpid(fork, 0)
    with suppress(OSError):
        asked.sendall(LENGTH.pack(status))
    os._exit(0)


def receive(connection: socket.socket, length: int) -> bytes:
    parts = b""
    while len(parts) < length and (part := connection.recv(length - len(parts))):
        parts += part
    return parts


def begin(streams: list[int], folder: str, environment: dict[str, str], arguments: list[str]) -> None:
    """Be the process that was asked for."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    paths = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[1:1] = [path for path in paths if path and path not in sys.path[1:]]
    sys.argv = arguments


def run(arguments: list[str]) -> None:
    """What Python does with these arguments."""
    import runpy
    import types

    first, *rest = arguments
    if first == "-c":
        code, sys.argv = rest[0], ["-c", *rest[1:]]
        sys.path[0] = ""
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(code, "<string>", "exec"), vars(sys.modules["__main__"]))
    elif first == "-m":
        sys.argv = rest
        sys.path[0] = os.getcwd()
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = os.path.dirname(os.path.abspath(first))
        runpy.run_path(first, run_name="__main__")


# ---- the process that a test starts


def ask(address: str, arguments: list[str]) -> None:
    """Ask for a fork and end as it ends."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        for each in PASSED_ON:
            signal.signal(each, lambda number, _: server.sendall(bytes([number])))
        request = {"folder": os.getcwd(), "environment": dict(os.environ), "arguments": arguments}
        data = json.dumps(request).encode()
        socket.send_fds(server, [LENGTH.pack(len(data))], [0, 1, 2])
        server.sendall(data)
        answer = receive(server, LENGTH.size)
    if not answer:
        sys.exit("the process that forks has ended")
    (status,) = LENGTH.unpack(answer)
    if os.WIFSIGNALED(status):
        for each in PASSED_ON:
            signal.signal(each, signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(int(sys.argv[2]))
        run(sys.argv)
    else:
        ask(sys.argv[1], sys.argv[2:])
