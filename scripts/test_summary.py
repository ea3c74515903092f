"""Add up what the test sessions of one `./lab test` left in a file, one JSON object a line.

Prints what did not run on this machine and why, and last the sum. Exits with 1 where a session ended
badly or a test failed, and with 5 where nothing ran at all.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path


def main() -> int:
    sessions = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    not_run: Counter[tuple[str, str]] = Counter()
    total: Counter[str] = Counter()
    for session in sessions:
        total.update(session["outcomes"])
        for need, reason, count in session["not_run"]:
            not_run[need, reason] += count
    if not_run:
        print("Not run on this machine:")
        for (need, reason), count in sorted(not_run.items()):
            verb = "needs" if count == 1 else "need"
            print(
                f"  {count} {'test' if count == 1 else 'tests'}{f' {verb} {need}' if need else ''}: {reason}"
            )
    for session in sessions:
        for problem in session["problems"]:
            print(f"In {session['part']}: {problem}")
    failed = total["failed"] + total["error"]
    passed = total["passed"] + total["xfailed"]
    skipped = f", {total['skipped']} skipped" if total["skipped"] else ""
    print(f"tests: {passed} passed, {failed} failed{skipped}")
    if failed or any(session["problems"] for session in sessions):
        return 1
    return 0 if passed else 5


if __name__ == "__main__":
    sys.exit(main())
