"""A signal ends a run at any moment: no process is left, no step is lost, and the same command continues the run."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import ROOT, launch
from tests.helpers.runs import endless, tiny_vqa

pytestmark = [pytest.mark.distributed, pytest.mark.alone]
LIMIT = 240.0  # seconds a busy machine may take for all of it


def launcher_runs(launched: launch.Launch, run: Path) -> None:
    """`deepspeed` has started launch.py, which still imports: there is no rank that could notice anything."""
    while not any("deepspeed.launcher.launch" in " ".join(p.cmdline()) for p in launched.members()):
        time.sleep(0.01)


def rank_runs(launched: launch.Launch, run: Path) -> None:
    while not launched.ranks():
        time.sleep(0.01)


def ranks_meet(launched: launch.Launch, run: Path) -> None:
    """A moment of the imports or the build."""
    rank_runs(launched, run)
    time.sleep(6)


def steps_are_done(launched: launch.Launch, run: Path) -> None:
    endless.reach(run, 3, lambda: bool(launched.members()), LIMIT)


def to_deepspeed(launched: launch.Launch) -> None:
    launched.process.send_signal(signal.SIGTERM)


def kills_deepspeed(launched: launch.Launch) -> None:
    launched.process.kill()


def kills_launch_py(launched: launch.Launch) -> None:
    launched.ranks()[0].parent().kill()


def to_all(launched: launch.Launch) -> None:
    os.killpg(launched.session, signal.SIGTERM)


def to_rank_1(launched: launch.Launch) -> None:
    launched.ranks()[1].terminate()


def ctrl_c(launched: launch.Launch) -> None:
    os.killpg(launched.session, signal.SIGINT)


def hang_up(launched: launch.Launch) -> None:
    """The terminal, or the connection to the machine, is closed."""
    os.killpg(launched.session, signal.SIGHUP)


def ctrl_c_twice(launched: launch.Launch) -> None:
    ctrl_c(launched)
    time.sleep(1.5)
    ctrl_c(launched)


def stopped(folder: Path, moment: Callable, act: Callable) -> launch.Result:
    recipe = endless.prepare(folder)
    with launch.Launch(ROOT / "launchers" / "train.py", "--recipe", str(recipe), ranks=2) as launched:
        moment(launched, folder / "run")
        act(launched)
        return launched.wait(LIMIT)


def own_frames(output: str) -> list[str]:
    """Functions of ours in tracebacks.

    `deepspeed` itself answers Ctrl-C with a traceback, and so does Python where a rank imports what would listen.
    """
    frame = rf'File "{ROOT}/mmpeft_ds/.*", line \d+, in (.*)'
    return [name for name in re.findall(frame, output) if name != "<module>"]


def check(result: launch.Result, run: Path) -> None:
    """Nothing is left, every step that was done is saved, and no rank printed a traceback."""
    assert not result.killed, result.tail()
    assert not own_frames(result.output), result.tail()
    steps = endless.steps_of(run)
    if steps and "a second Ctrl-C" not in result.output:
        assert (run / "checkpoints" / "latest").read_text().split(".")[0].strip() == f"step-{steps[-1]:08d}"
        words = f"stopped after step {steps[-1]} of {endless.STEPS}; the same command continues it ("
        assert words in result.output, result.tail()  # with the reason, whichever rank knows it
    elif not steps:
        assert result.output.count("stopped before it began") <= 1, result.tail()
    # The resource tracker's lines about named semaphores, which are removed.
    assert "leaked" not in result.output, result.tail()


def test_a_traceback_of_ours_is_told_from_one_of_an_import_that_ctrl_c_ends():
    importing = f'  File "{ROOT}/mmpeft_ds/console.py", line 3, in <module>\n'
    assert own_frames(importing + f'  File "{ROOT}/mmpeft_ds/stop.py", line 7, in leave\n') == ["leave"]
    assert not own_frames(importing + '  File "/usr/lib/__editable___mmpeft_ds_0_1_0_finder.py", line 1, in find\n')


def test_sigterm_to_deepspeed_before_there_are_ranks_leaves_no_run(tmp_path):
    result = stopped(tmp_path, launcher_runs, to_deepspeed)
    check(result, tmp_path / "run")
    assert "stopped before it began (the `deepspeed` command that started launch.py" in result.output, result.tail()
    assert not endless.steps_of(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("act", [to_deepspeed, kills_deepspeed, to_all, to_rank_1, ctrl_c, ctrl_c_twice, hang_up])
@pytest.mark.parametrize("moment", [rank_runs, ranks_meet, steps_are_done])
def test_whoever_gets_a_signal_and_whenever(tmp_path, moment, act):
    if act is to_rank_1 and moment is rank_runs:
        pytest.skip("there may be no rank 1 yet")
    check(stopped(tmp_path, moment, act), tmp_path / "run")


@pytest.mark.slow
def test_a_run_whose_inner_launcher_is_killed_tells_its_state_where_deepspeed_says_0(tmp_path):
    result = stopped(tmp_path, steps_are_done, kills_launch_py)
    check(result, tmp_path / "run")
    assert result.code == 0 and "the same command continues it (the launcher (pid" in result.output
    assert not (tmp_path / "run" / "finished.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["evaluate.py", "features.py", "fisher.py", "describe.py", "few_shot.py"])
def test_every_launcher_ends_from_its_first_second_on(tmp_path, launcher):
    tiny_vqa.prepare(tmp_path)
    data, recipe, run = (str(tmp_path / name) for name in ("data", "recipe.yaml", "finished"))
    Path(run).mkdir()
    shutil.copy(recipe, Path(run) / "recipe.yaml")
    words = {
        "evaluate.py": ["--run", run, "--split", "train"],
        "features.py": ["--data", data, "--out", str(tmp_path / "out"), "--recipe", recipe],
        "fisher.py": ["--run", run, "--out", str(tmp_path / "f.safetensors")],
        "describe.py": ["--data", data, "--out", str(tmp_path / "out"), "--recipe", recipe],
        "few_shot.py": ["--recipe", str(ROOT / "recipes" / "few_shot_emoji.yaml")],
    }
    with launch.Launch(ROOT / "launchers" / launcher, *words[launcher], ranks=2) as launched:
        rank_runs(launched, tmp_path)
        to_deepspeed(launched)
        result = launched.wait(LIMIT)
    check(result, tmp_path / "run")
    assert "stopped before it began" in result.output, result.tail()
