"""A contender's process without torch, which answers at once; what is wrong with `fast` is named by BROKEN."""

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

ROUNDS = {"reference, SDPA": 0.3, "fast": 0.2}  # seconds that a round is said to have taken


def main() -> None:
    """Answer requests until the pipe closes, as `bench.worker` does."""
    contender = json.loads(sys.stdin.readline())["contender"]
    broken = os.environ["BROKEN"] if contender == "fast" else ""
    tell({"error": "ValueError: it can't do that"} if broken == "unable" else {})
    for line in sys.stdin:
        request = json.loads(line)
        if request["ask"] == "check":
            check(request["with"]["path"], broken)
            tell({})
        else:
            tell({"seconds": ROUNDS[contender], "resident_bytes": 1000})


def tell(reply: dict[str, object]) -> None:
    """Send an answer."""
    print(json.dumps(reply), flush=True)


def check(path: str, broken: str) -> None:
    """Write the outputs, or fail."""
    loss = np.full(3, 2.0, np.float32)
    if broken == "off":
        loss *= 1.01
    elif broken == "infinite":
        loss *= np.inf
    elif broken == "dead":
        os._exit(3)
    elif broken == "stuck":
        Path(os.environ["STUCK"]).touch()
        while True:
            signal.pause()
    save_file({"gradient" if broken == "other" else "loss": loss}, path)


if __name__ == "__main__":
    main()
