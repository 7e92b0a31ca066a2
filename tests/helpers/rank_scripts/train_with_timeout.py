"""launchers/train.py whose collectives give up after SECONDS, in the place of half an hour.

python -m tests.helpers.rank_scripts.train_with_timeout SECONDS --recipe R.yaml
"""

import datetime
import runpy
import sys

from mmpeft_ds.distributed import processes
from tests.helpers import ROOT

if __name__ == "__main__":
    processes._TIMEOUT = datetime.timedelta(seconds=float(sys.argv.pop(1)))
    runpy.run_path(str(ROOT / "launchers" / "train.py"), run_name="__main__")
