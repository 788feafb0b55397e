"""Ending a command by Ctrl-C, by SIGTERM, or by SIGHUP when its terminal is closed."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

WORDS = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "hung up"}


class Ending:
    """A context in which each of the signals raises KeyboardInterrupt.

    After the first `after_step` there is a result to keep: then the first signal is only stored, `after_step`
    returns True, and later work (such as saving) is not interrupted. A second signal raises.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._learnt = False
        self._before: dict[signal.Signals, object] = {}
        # Writing to a closed terminal is an error; writing to a file or pipe is not.
        self._terminals = [number for number in (1, 2) if os.isatty(number)]

    @property
    def code(self) -> int:
        """The exit code: 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP."""
        return 128 + (self.signal or signal.SIGINT)

    def __str__(self) -> str:
        return WORDS[(self.signal or signal.SIGINT).name]

    def after_step(self, _step: int, _loss: float) -> bool:
        """The callback of `escd.customize`: whether to stop here."""
        self._learnt = True
        return self.signal is not None

    def __enter__(self) -> Ending:
        if threading.current_thread() is threading.main_thread():  # only the main thread may set handlers
            for each in (getattr(signal, name) for name in WORDS if hasattr(signal, name)):
                if signal.getsignal(each) is not signal.SIG_IGN:  # such as under nohup
                    self._before[each] = signal.signal(each, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        again, self.signal = self.signal is not None, signal.Signals(number)
        if self.signal.name == "SIGHUP":
            nothing = os.open(os.devnull, os.O_WRONLY)
            for terminal in self._terminals:
                os.dup2(nothing, terminal)
        if again or not self._learnt:
            raise KeyboardInterrupt


def run_command(main: Callable[[], object]) -> NoReturn:
    """Run a command that can be restarted at any time, and exit with its code.

    After a signal it prints one line instead of a traceback; finished results are stored.
    """
    with Ending() as ending:
        try:
            main()
        except KeyboardInterrupt:
            print(f"\n{ending}: what is finished is kept; start it again to go on", file=sys.stderr)
            sys.exit(ending.code)
    sys.exit(0)
