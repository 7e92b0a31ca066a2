"""A launcher that may write files of no more than LARGEST_FILE bytes, as under a quota or `ulimit -f`."""

from __future__ import annotations

import os
import resource
import runpy
import sys

if __name__ == "__main__":
    largest = int(os.environ["LARGEST_FILE"])
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    sys.argv = sys.argv[1:]
    sys.path.insert(0, os.path.dirname(sys.argv[0]))  # under test: a launcher replaces it
    runpy.run_path(sys.argv[0], run_name="__main__")
