"""Ranks that train studies, and recipes alone, one after the other in one process group.

deepspeed --num_accelerators 2 --module tests.helpers.rank_scripts.train_study RECIPE.yaml ...

Beside a study's run directory, RUN_DIR.calls has how often the vision tower ran on rank 0.
"""

import sys
from pathlib import Path

import yaml
from transformers import ViTModel

from mmpeft_ds import recipe as recipes
from mmpeft_ds.distributed.collectives import rank
from mmpeft_ds.engine import trainer
from mmpeft_ds.engine.study import run
from mmpeft_ds.errors import BadInput
from mmpeft_ds.recipe.study import Study

calls = 0
plain = ViTModel.forward


def counted(self, *args, **kwargs):
    global calls
    calls += 1
    return plain(self, *args, **kwargs)


if __name__ == "__main__":
    ViTModel.forward = counted
    for path in sys.argv[1:]:
        if path.startswith("--"):
            continue
        raw = yaml.safe_load(Path(path).read_text())
        calls = 0
        try:
            code = run.run(Study.load(path)) if "study" in raw else trainer.run(recipes.load(path))
        except BadInput as error:
            code = f"2: {error}"
        if rank() == 0:
            Path(f"{raw['run_dir']}.calls").write_text(str(calls))
            Path(f"{raw['run_dir']}.code").write_text(str(code))
