"""What a stage found, in one JSON file that is complete after every case, and that several
processes may write."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from courier_fast.files import write_atomically

PASSED, FAILED, SKIPPED, RUNNING, STOPPED = "passed", "failed", "skipped", "running", "stopped"
DONE = (PASSED, FAILED, SKIPPED)
# A case that was stopped after this many seconds in this many runs hangs, and is not begun again.
FAIR, ATTEMPTS = 30.0, 2


@dataclass
class Result:
    """What became of a case: a line for people, and what was measured."""

    line: str
    status: str = PASSED
    data: dict[str, Any] = field(default_factory=dict)


class Record:
    """DIR/<stage>.json."""

    def __init__(self, out: Path, stage: str) -> None:
        self.path = out / f"{stage}.json"
        self.stage = stage

    def read(self) -> dict[str, Any]:
        empty = {"stage": self.stage, "expected": None, "seconds": 0.0, "problem": None}
        return json.loads(self.path.read_text()) if self.path.exists() else empty | {"cases": {}}

    @contextlib.contextmanager
    def changed(self) -> Iterator[dict[str, Any]]:
        """The content, to be changed; one process at a time."""
        with open(self.path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            content = self.read()
            yield content
            text = json.dumps(content, indent=1) + "\n"
            write_atomically(self.path, lambda path: path.write_text(text))

    def claim(self, keys: Sequence[str]) -> str | None:
        """The next case that nobody has, now this process's."""
        with self.changed() as content:
            content["expected"] = len(keys)
            for key in keys:
                found = content["cases"].get(key, {"status": STOPPED, "attempts": 0})
                if found["status"] == STOPPED and "again" not in found:
                    begun = {"status": RUNNING, "pid": os.getpid(), "start": time.time()}
                    content["cases"][key] = begun | {"attempts": found["attempts"]}
                    return key
        return None

    def put(self, key: str, result: Result) -> None:
        with self.changed() as content:
            seconds = time.time() - content["cases"][key]["start"]
            content["cases"][key] = asdict(result) | {"seconds": round(seconds, 2)}

    def settle(self, pid: int, reason: str, stopped: bool) -> bool:
        """Closes what a process left open when it ended; whether there was anything."""
        with self.changed() as content:
            mine = [c for c in content["cases"].values() if c.get("pid") == pid]
            for case in mine:
                case["attempts"] += time.time() - case["start"] >= FAIR
                again = stopped and case["attempts"] < ATTEMPTS
                # "again": in another run, not in this one.
                more: dict[str, Any] = {"again": True} if again else {"data": {}, "seconds": None}
                del case["pid"]
                case.update(status=STOPPED if again else FAILED, line=reason, **more)
        return bool(mine)

    def open_again(self) -> None:
        """What was stopped, or left open by a run that was killed, may be tried once more."""
        with self.changed() as content:
            content["problem"] = None
            for case in content["cases"].values():
                case.pop("again", None)
                if case["status"] == RUNNING:
                    case["status"] = STOPPED


def finished(content: Mapping[str, Any]) -> bool:
    """Whether every case has a result."""
    done = [c for c in content["cases"].values() if c["status"] in DONE]
    return content["expected"] is not None and len(done) >= content["expected"]
