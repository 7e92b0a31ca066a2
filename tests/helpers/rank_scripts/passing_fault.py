"""Ranks that train recipes whose first checkpoint finds no room, one after the other, and each once more.

    ... tests.helpers.rank_scripts.passing_fault RECIPE.yaml ...     how each start ended, as a list in RUN_DIR.ends

After each start, RUN_DIR.1 and RUN_DIR.2 are copies of the checkpoints without the tensors.
"""

import json
import shutil
import sys
from pathlib import Path
from unittest import mock

from mmpeft_ds import recipe as recipes
from mmpeft_ds.distributed.collectives import on_rank0
from mmpeft_ds.engine import checkpoint_files, trainer
from mmpeft_ds.errors import BadInput

write = checkpoint_files.write


def full_once(calls: list) -> object:
    def attempt(folder, *args):
        calls.append(folder)
        if len(calls) == 1:
            raise OSError(28, "No space left on device", str(folder))
        return write(folder, *args)

    return mock.patch.object(checkpoint_files, "write", attempt)


def train(path: str, calls: list) -> str:
    try:
        with full_once(calls):
            return str(trainer.run(recipes.load(path)))
    except BadInput as error:
        return f"2: {error}"


if __name__ == "__main__":
    for path in filter(lambda word: not word.startswith("--"), sys.argv[1:]):
        run, calls, ends = Path(recipes.load(path).run_dir), [], []
        for start in (1, 2):
            ends.append(train(path, calls))
            kept = shutil.ignore_patterns("*.safetensors")
            on_rank0(lambda: shutil.copytree(run / "checkpoints", f"{run}.{start}", ignore=kept) and None)  # noqa: B023
        on_rank0(lambda: Path(f"{run}.ends").write_text(json.dumps(ends)))  # noqa: B023
