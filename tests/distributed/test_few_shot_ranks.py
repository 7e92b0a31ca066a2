"""A few-shot study under the real launcher: two ranks have the scores of one, and go on with what one has begun."""

import pytest

from mmpeft_ds.runs import few_shot, few_shot_study
from tests.helpers import ROOT
from tests.helpers.launch import run
from tests.helpers.runs import tiny_study

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_two_ranks_have_the_scores_of_one_and_go_on_where_it_stopped(tmp_path):
    methods = [{"name": "TaskRes", "features": "one", "method": {"name": "task_res"}}]
    studies, files = [], []
    for ranks in (1, 2):
        made = tiny_study.recipe(tmp_path, run_dir=str(tmp_path / f"study-{ranks}"), methods=methods)
        files.append(tiny_study.write(tmp_path / f"study-{ranks}.yaml", made))
        studies.append(few_shot_study.Study.load(files[-1]))
    assert few_shot.run(studies[0])
    assert few_shot.run(studies[1].only([], [1], [1]))
    done = run(ROOT / "launchers" / "few_shot.py", "--recipe", str(files[1]), ranks=2)
    assert done.code == 0, done.tail()
    assert "[1/4]" not in done.output and "[2/4]" in done.output and "4 of 4 runs are done" in done.output
    assert (tmp_path / "study-2" / "results.png").is_file()
    one, two = (few_shot_study.results(study) for study in studies)
    for a, b in zip(one, two, strict=True):
        assert {test: s["accuracy"] for test, s in a["tests"].items()} == pytest.approx(
            {test: s["accuracy"] for test, s in b["tests"].items()}, abs=0.051
        )
