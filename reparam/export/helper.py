"""A process that runs `onnxsim_program.py`: started when it is first asked, and anew after a crash or a standstill."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path

PROGRAM = Path(__file__).with_name("onnxsim_program.py")


class HelperError(Exception):
    """There is no answer; the message says why."""


class Helper:
    """Asks a program of ours, by lines of JSON.

    Args:
        program: reads requests from standard input and answers each with one line on standard output.
    """

    def __init__(self, program: Path = PROGRAM) -> None:
        self._program = program
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0
        atexit.register(self.stop)

    def ask(self, request: object, seconds: float) -> object:
        """The answer to a request.

        Raises:
            HelperError: the process cannot be started, crashed, or did not answer within so many seconds.
        """
        with self._lock:
            try:
                return self._ask(request, seconds)
            except EOFError:  # it had just ended because it had nothing to do
                pass
            try:
                return self._ask(request, seconds)
            except EOFError:
                raise HelperError("ended without an answer") from None

    def stop(self) -> None:
        """Ends the process, if there is one of ours."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():  # a forked child must leave its parent's alone
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):  # a request that nobody read
                pipe.close() if pipe is not None else None

    def _ask(self, request: object, seconds: float) -> object:
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        lines: queue.Queue[str] = queue.Queue()
        reader = process.stdout
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        except OSError:
            self.stop()
            raise EOFError from None
        threading.Thread(target=lambda: lines.put(reader.readline()), daemon=True).start()
        try:
            line = lines.get(timeout=seconds)
        except queue.Empty:
            self.stop()
            raise HelperError(f"was stopped after {seconds:.0f} seconds") from None
        if line:
            return json.loads(line)
        status = process.wait()
        self.stop()
        if status == 0:
            raise EOFError
        raise HelperError(f"crashed with signal {-status}" if status < 0 else f"ended with status {status}")

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
            self.stop()
            try:
                self._process = subprocess.Popen(
                    [sys.executable, str(self._program)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                )
            except OSError as error:
                raise HelperError(f"could not be started ({error})") from error
            self._owner = os.getpid()
        return self._process
