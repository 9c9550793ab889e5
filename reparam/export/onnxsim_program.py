"""Run as a program by `simplify.py`: onnxsim from file to file, one request after the other.

A request is a line with the JSON list `[source, target]`; the answer is a line with a JSON string: empty, or why there
is no target. It ends when there are no more requests, or when none came for a while.
"""

from __future__ import annotations

import json
import os
import sys
import threading

IDLE = 60.0
"""Seconds without a request after which the process ends."""
# A program's own folder comes first on its path, and files of this one have the names of packages.
HERE = os.path.dirname(os.path.abspath(__file__))


def main() -> None:
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != HERE]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what onnxsim prints must not get among the answers
    while True:
        goodbye = threading.Timer(IDLE, os._exit, (0,))
        goodbye.daemon = True
        goodbye.start()
        line = sys.stdin.readline()
        goodbye.cancel()
        if not line:
            return
        print(json.dumps(simplify(*json.loads(line))), file=answers, flush=True)


def simplify(source: str, target: str) -> str:
    """Why there is no target; empty if there is one."""
    try:
        import onnx
        import onnxsim

        made, _ = onnxsim.simplify(onnx.load(source))
        onnx.save_model(made, target)
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        return f"onnxsim failed ({lines[0][:200]})"
    return ""


if __name__ == "__main__":
    main()
