"""A rank that runs scripts of the repository one after the other in one process.

JOBS.json holds {name: [[script, argument, ...], ...]}; a job ends with the first of its scripts that fails, which is
printed as `failed: NAME: ...`. For `launch.run_forked`.
"""

import json
import runpy
import sys
import traceback
from pathlib import Path


def code_of(line: list[str]) -> int:
    """The exit code of a script."""
    sys.argv = line
    try:
        runpy.run_path(line[0], run_name="__main__")
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else int(bool(left.code))
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def main(jobs: dict[str, list[list[str]]]) -> int:
    """0 if every job came to its end."""
    failed = 0
    for name, lines in jobs.items():
        for line in lines:
            if code_of(line):
                failed += 1
                print(f"failed: {name}:", *line, flush=True)
                break
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(json.loads(Path(sys.argv[1]).read_text("utf-8"))))
