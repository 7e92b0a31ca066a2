"""The commands as a user types them: exit codes, one line for bad input, no traceback."""

import datetime
import json
import subprocess
import sys

import pytest

from mmpeft_ds import console
from mmpeft_ds.errors import BadInput
from tests.helpers import ROOT
from tests.helpers.runs import tiny_vqa


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("toy")
    tiny_vqa.prepare(path)
    return path


def is_one_line(err: str, *words: str) -> bool:
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert all(word in line for word in words), line
    return "Traceback" not in err


def test_bad_input_from_the_shell_is_one_line_and_exit_code_2(folder):
    done = subprocess.run(
        [sys.executable, ROOT / "launchers" / "train.py", "--recipe", folder / "recipe.yaml", "--set", "optim.lrr=1"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=folder,  # from anywhere
    )
    assert done.returncode == 2 and is_one_line(done.stderr, "optim.lrr", "'lr'")


@pytest.mark.parametrize(("script", "more"), [("train.py", []), ("study.py", ["--vary", "seed=1"])])
def test_check_with_fresh_looks_at_the_new_directory(command, folder, tmp_path, script, more):
    """What stands at the old one, here files that are not a run's, does not matter then."""
    old = tmp_path / "run"
    for taken in (old, old / "seed1"):
        taken.mkdir()
        (taken / "photo.jpg").touch()
    sets = ["--set", f"run_dir={old}", "--set", "engine.deepspeed=ds_configs/zero1.json"]
    words = ["--recipe", folder / "recipe.yaml", *sets, *more, "--check"]
    code, _, err = command(script, *words)
    assert code == 2 and is_one_line(err, "not a run's")
    code, _, err = command(script, *words, "--fresh")
    assert code == 0, err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_check_prints_sizes_and_trains_nothing(command, folder):
    code, out, _ = command("train.py", "--recipe", folder / "recipe.yaml", "--check")
    assert code == 0 and not (folder / "run").exists()
    assert "ZeRO-3" in out and "ZeRO-1" in out and "head" in out and "10 steps" in out


def test_check_as_json(command, folder, tmp_path):
    code, out, _ = command("train.py", "--recipe", folder / "recipe.yaml", "--check", "--json", "-")
    assert code == 0 and json.loads(out)["total_steps"] == 10
    file = tmp_path / "check.json"
    code, tables, _ = command("train.py", "--recipe", folder / "recipe.yaml", "--check", "--json", file)
    assert code == 0 and json.loads(file.read_text()) == json.loads(out) and "ZeRO-3" in tables


def test_the_plan_fits_80_columns_and_says_each_thing_once(command, folder):
    changed = ("--set", "engine.deepspeed=ds_configs/zero1.json")
    code, out, _ = command("train.py", "--recipe", folder / "recipe.yaml", "--check", *changed)
    assert code == 0 and max(map(len, out.splitlines())) <= 80
    assert out.count("ZeRO-1") == 1 and "%)" in out and "( " not in out


def test_a_recipe_is_sized_before_its_data_is_there_and_what_is_assumed_is_marked(command, folder):
    absent = [word for role in ("sources", "validation") for word in ("--set", f"data.{role}.0.dir=data/not-yet")]
    words = ("--recipe", folder / "recipe.yaml", *absent)
    code, out, _ = command("train.py", *words, "--check", "--samples", "600", "--labels", "7")
    assert code == 0 and "600 assumed" in out and "7 assumed" in out and "200 steps" in out
    code, _, err = command("train.py", *words, "--check")
    assert code == 2 and is_one_line(err, "data/not-yet/manifest.json", "prepare.py", "--check --samples N")
    code, _, err = command("train.py", *words, "--samples", "600")
    assert code == 2 and is_one_line(err, "--samples", "--check")
    code, out, _ = command("train.py", "--recipe", folder / "recipe.yaml", "--check", "--samples", "600")
    assert code == 0 and "assumed" not in out, "negative control: what is there is counted"


def test_the_plan_for_other_numbers_of_ranks(command, folder):
    words = ("--recipe", folder / "recipe.yaml", "--check", "--json", "-")
    _, out, _ = command("train.py", *words, "--ranks", "3", "24")
    assert {"3", "24", "64"} <= set(json.loads(out)["bytes_per_rank"])
    code, _, err = command("train.py", *words, "--ranks", "0")
    assert code == 2 and is_one_line(err, "--ranks")


def test_check_says_what_a_start_would_do_in_the_run_directory(command, folder, tmp_path, monkeypatch):
    from mmpeft_ds import recipe as recipes
    from mmpeft_ds.engine import checkpoint_files, rundir

    run = tmp_path / "run"
    words = ("train.py", "--recipe", folder / "recipe.yaml", "--check", "--set", f"run_dir={run}")
    trained = recipes.filled(recipes.load(folder / "recipe.yaml", [f"run_dir={run}", "optim.epochs=6"]))
    run.mkdir()
    (run / "recipe.yaml").write_text(recipes.to_yaml(trained))
    saved = {"recipe": recipes.to_dict(trained), "state": {"step": 30}}
    monkeypatch.setattr(checkpoint_files, "newest", lambda folder: run / "checkpoints" / "step-30")
    monkeypatch.setattr(checkpoint_files, "read_json", lambda path, name: saved[name])
    code, out, err = command(*words, "--set", "optim.epochs=8")
    assert code == 0 and "continues this run after step 30 of 40" in " ".join(out.split()), err
    code, _, err = command(*words, "--set", "optim.lr=0.5")
    assert code == 2 and is_one_line(err, "optim.lr: 0.01 -> 0.5", "--fresh")
    opened = rundir.RunDir(run)
    opened.finish(30, {}, "the table")
    monkeypatch.setattr(rundir, "whole", lambda adapter: None)
    code, out, _ = command(*words)
    assert code == 0 and "finished, with 30 steps, and 10 are asked for" in " ".join(out.split())
    assert (run / "finished.json").exists() and not (run / ".lock").exists(), "--check leaves it as it is"


def test_print_recipe_prints_a_recipe_that_loads(command, folder, tmp_path):
    from mmpeft_ds import recipe as recipes

    code, out, _ = command("train.py", "--recipe", folder / "recipe.yaml", "--print-recipe", "--set", "seed=9")
    (tmp_path / "r.yaml").write_text(out)
    assert code == 0 and recipes.load(tmp_path / "r.yaml").seed == 9


@pytest.mark.parametrize(
    ("script", "args", "words"),
    [
        ("train.py", [], ["--recipe"]),
        ("train.py", ["--recipe", "none.yaml"], ["none.yaml", "No such file"]),
        ("train.py", ["--recipe", "x", "--sett", "y"], ["--sett"]),
        ("train.py", ["--recipe", "x", "--json", "y"], ["--json", "--check"]),
        ("evaluate.py", ["--run", "no/such/run"], ["no/such/run", "recipe.yaml"]),
        ("predict.py", ["--adapter", "a", "--images", "no-images", "--text", "x"], ["no-images"]),
        ("predict.py", ["--adapter", "a", "--images", str(ROOT / "recipes"), "--text", "x"], ["no image"]),
        (
            "predict.py",
            ["--adapter", "a", "--images", str(ROOT / "LICENSE"), "--text", "x"],
            ["LICENSE", "no picture"],
        ),
        (
            "predict.py",
            ["--adapter", "a", "--images", str(ROOT / "docs/images/easy_vqa_answers.png"), "--text", "x"],
            ["a:", "adapter"],
        ),
    ],
)
def test_bad_arguments_are_one_line(command, script, args, words):
    code, _, err = command(script, *args)
    assert code == 2 and is_one_line(err, *words)


@pytest.mark.parametrize("flag", ["--local_rank=1", "--local-rank=1"])
def test_the_argument_that_launchers_add_is_accepted(command, folder, flag):
    code, out, _ = command("train.py", flag, "--recipe", folder / "recipe.yaml", "--print-recipe")
    assert code == 0 and out.startswith("run_dir:")


def test_only_rank_0_speaks_of_an_error_that_all_ranks_have(monkeypatch, capsys):
    def bad():
        raise BadInput("a\nb")

    for rank, printed in (("0", "error: a\\nb\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as left:
            console.run(bad)
        assert left.value.code == 2 and capsys.readouterr().err == printed


@pytest.mark.parametrize(("rank_0_failed", "printed"), [(True, 0), (False, 1)])
def test_an_error_that_rank_0_does_not_have_is_told_once(monkeypatch, capsys, rank_0_failed, printed):
    """Ranks 1 and 2 fail one after the other, with or without rank 0."""
    import torch

    def bad():
        raise BadInput("only here")

    store = torch.distributed.HashStore()
    monkeypatch.setattr(console, "_store", lambda: store)
    monkeypatch.setattr(console, "PATIENCE", datetime.timedelta(milliseconds=50))
    for rank in ("0", "1", "2") if rank_0_failed else ("1", "2"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit):
            console.run(bad)
        if rank == "0":
            capsys.readouterr()
    assert capsys.readouterr().err.count("only here") == printed


def test_a_fault_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        console.run(lambda: 1 / 0)


GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:9\nC"


@pytest.mark.parametrize("kind", ["gloo", "store"])
def test_a_rank_that_lost_another_says_so_in_one_line(monkeypatch, capsys, kind):
    import torch

    def alone():
        raise RuntimeError(GLOO) if kind == "gloo" else torch.distributed.DistNetworkError("Broken pipe")

    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit) as left:
        console.run(alone)
    err = capsys.readouterr().err
    assert left.value.code == 1 and err.count("\n") == 1 and err.startswith("rank 3: lost its connection to another")
    with pytest.raises(RuntimeError, match="ours"):
        console.run(lambda: (_ for _ in ()).throw(RuntimeError("a fault of ours")))


def test_the_split_to_evaluate_on_is_one_that_is_there(folder, tmp_path):
    from mmpeft_ds.data.manifest import Manifest
    from mmpeft_ds.runs import inputs

    data = Manifest.load(folder / "data")
    assert inputs.default_split([data.dir]) == "val"
    splits, index = data.splits, data.index

    def default(*names):
        data.splits = {name: splits["val"] for name in names}
        data.index = {name: index["val"] for name in names}
        data.save(tmp_path)
        return inputs.default_split([tmp_path])

    assert default("train", "val", "test") == "test"
    assert default("train", "held_out") == "held_out"
    for names in (("train", "a", "b"), ("train",)):
        with pytest.raises(BadInput, match=f"--split.*{', '.join(names)}"):
            default(*names)


def test_scores_stand_beside_their_baselines(capsys):
    scores = {"accuracy": 0.5, "accuracy_yes_no": 0.25, "loss": 1.0}
    console.score_table(scores, {"prior": 0.125, "prior_yes_no": 0.75}, "t")
    lines = capsys.readouterr().out.splitlines()
    for words in (["accuracy ", "0.1250", "0.5000"], ["accuracy_yes_no", "0.7500", "0.2500"], ["loss", "-", "1.0000"]):
        assert any(all(word in line for word in words) for line in lines), words
