"""Helpers of the tests, imported as `tests.helpers...`; nothing here is a test.

`tiny_*` is a small made-up thing with random weights or drawn content:

* `models/`: models, and the checkpoint directories that `write...` makes of them,
* `data/`: images and prepared data sets,
* `runs/`: what a training run needs together: a data set, a model, a task and a recipe.

Beside them:

* `references/`: plain computations in one process that ranks together must equal,
* `launch`: the real launcher, and `rank_scripts/`: the modules that its ranks run,
* `forked_ranks`: ranks as forked processes of the test,
* `commands`: scripts of launchers/ and data_prep/ inside the process of the test,
* `goldens`: reference vector files,
* `method_table`: the table of docs/methods.md; `memory_table`: that of docs/memory.md,
* `doc_pages` and `doc_checks`: code blocks of the documentation, and what must hold of them.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
