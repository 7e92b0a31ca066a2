"""Studies: every member is, number for number, the run of its recipe alone; the frozen tower runs once for all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from mmpeft_ds import recipe as recipes
from mmpeft_ds.recipe.study import Study
from tests.helpers import launch
from tests.helpers.runs import tiny_kinds, tiny_vqa

pytestmark = pytest.mark.distributed
SCRIPT = "tests.helpers.rank_scripts.train_study"
STEPS, VAL_STEPS = 5, 2  # of an epoch, of an evaluation
LORA = {"name": "lora", "r": 2}
ROUTED = {"name": "routed_lora", "r": 2, "alpha": 4, "route": "mul", "train_norms": True, "train_bias": True}
MEMBERS = [
    {"name": "first"},
    {"name": "slow", "optim": {"lr": 0.003}},
    {"name": "seeded", "method": {"r": 4}, "seed": 5},
    {"name": "routed", "method": ROUTED, "optim": {"epochs": 1}},
]
SAME = ("step", "epoch", "loss", "lr", "grad_norm", "sample_keys_hash", "weight", "samples")


def write_study(folder: Path, name: str, stage: int, members: list[dict] | None = None, **sections) -> Path:
    """A study whose run directory is FOLDER/NAME."""
    engine = {"deepspeed": f"ds_configs/zero{stage}.json", "train_dropout": True, **sections.pop("engine", {})}
    made = tiny_vqa.recipe(folder, run_dir=str(folder / name), engine=engine, **sections)
    raw = recipes.to_dict(made) | {"method": LORA, "study": members or MEMBERS}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def write_alone(study: Path, name: str) -> Path:
    """The recipe of a member, to be trained alone in STUDY-NAME-alone."""
    raw = recipes.to_dict(Study.load(study).members[name])
    run = study.with_name(f"{study.stem}-{name}-alone")
    path = run.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(raw | {"run_dir": str(run)}))
    return path


def train(ranks: int, *paths: Path) -> list[str]:
    """How each of them ended."""
    result = launch.run_forked(SCRIPT, *map(str, paths), ranks=ranks)
    assert result.code == 0, result.tail()
    return [Path(f"{yaml.safe_load(path.read_text())['run_dir']}.code").read_text() for path in paths]


def rows(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in SAME} for line in lines]


def assert_equal_runs(one: Path, other: Path) -> None:
    """Curves, weights and final scores are the same to the last bit."""
    assert rows(one) == rows(other)
    weights, alone = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, other))
    assert weights.keys() == alone.keys()
    assert all(weights[key].equal(alone[key]) for key in weights)
    best = [json.loads((run / "adapter" / "metrics.json").read_text()) for run in (one, other)]
    assert [best[0][key] for key in ("best", "best_step", "steps")] == [
        best[1][key] for key in ("best", "best_step", "steps")
    ]


NAMES = [member["name"] for member in MEMBERS]
TWICE = [MEMBERS[0], {"name": "twice", "optim": {"accumulation": 2}}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("study")
    tiny_vqa.prepare(path)
    study = write_study(path, "two", 1)
    refused = [write_study(path, "stage3", 3), write_study(path, "twice", 1, TWICE)]
    ended = train(2, study, *(write_alone(study, name) for name in NAMES), *refused)
    assert ended[:-2] == ["0"] * (1 + len(NAMES))
    return path


@pytest.mark.parametrize("name", NAMES)
def test_a_member_is_the_run_of_its_recipe_alone(folder, name):
    assert_equal_runs(folder / "two" / name, folder / f"two-{name}-alone")


def test_members_differ_from_each_other_and_see_the_same_samples(folder):
    curves = {member["name"]: rows(folder / "two" / member["name"]) for member in MEMBERS}
    hashes = [[row["sample_keys_hash"] for row in curve[:STEPS]] for curve in curves.values()]
    assert all(h == hashes[0] for h in hashes)
    losses = {tuple(row["loss"] for row in curve[1:STEPS]) for curve in curves.values()}
    assert len(losses) == len(MEMBERS)


def test_the_vision_tower_runs_once_for_all_members(folder):
    alone = [int((folder / f"two-{name}-alone.calls").read_text()) for name in NAMES]
    longest = max(alone)
    assert sum(alone) > 3 * longest
    assert int((folder / "two.calls").read_text()) == longest


@pytest.mark.slow
def test_a_killed_study_goes_on_on_another_number_of_ranks(folder):
    members = [m | {"optim": {"lr": 0.01 + 0.001 * i}} for i, m in enumerate(MEMBERS[:3])]
    paths = [
        write_study(folder, name, 1, members, engine={"save_every": 2, "train_dropout": False}, optim={"epochs": 6})
        for name in ("killed", "whole")
    ]
    with launch.Launch("launchers/study.py", "--recipe", str(paths[0])) as running:
        assert running.wait_for("slow: step 10", 200)
        running.kill()
    saved = [len(rows(folder / "killed" / m["name"])) for m in members]
    assert all(10 <= count < 6 * STEPS for count in saved)
    assert train(1, *paths) == ["0", "0"]
    for member in members:
        one, other = (rows(folder / name / member["name"]) for name in ("killed", "whole"))
        assert [r["loss"] for r in one] == pytest.approx([r["loss"] for r in other], abs=1e-5)
        assert [r["sample_keys_hash"] for r in one] == [r["sample_keys_hash"] for r in other]


@pytest.mark.slow
def test_members_that_stopped_at_different_steps_meet_again(folder):
    path = write_study(folder, "apart", 1, MEMBERS[:2], engine={"save_every": 3})
    ahead = yaml.safe_load((folder / "two" / "first" / "recipe.yaml").read_text())
    ahead["run_dir"], ahead["engine"]["save_every"] = str(folder / "apart" / "first"), 3
    ahead["optim"]["max_steps"] = 7
    (folder / "ahead.yaml").write_text(yaml.safe_dump(ahead))
    assert train(2, folder / "ahead.yaml") == ["0"]
    assert train(2, path) == ["0"]
    assert rows(folder / "apart" / "slow") == rows(folder / "two" / "slow")
    assert rows(folder / "apart" / "first")[7:] != []


@pytest.mark.slow
def test_a_member_whose_loss_is_not_finite_ends_alone(folder):
    members = [MEMBERS[0], {"name": "wild", "optim": {"lr": 1e30, "clip": 0.0, "schedule": "constant", "warmup": 0.0}}]
    path = write_study(folder, "wild", 1, members, engine={"max_skipped": 2})
    (ended,) = train(2, path)
    assert ended.startswith("2: 1 of 2 members ended early. wild: step") and "not finite" in ended
    assert rows(folder / "wild" / "first") == rows(folder / "two" / "first")
    assert not (folder / "wild" / "wild" / "adapter").exists()
    table = (folder / "wild" / "study.md").read_text()
    assert "ended early" in table and "| first |" in table


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_member_whose_checkpoints_cannot_be_written_ends_alone(folder, ranks):
    run = folder / f"unwritten{ranks}"
    path = write_study(folder, run.name, 1, MEMBERS[:2])
    broken = run / "first"
    broken.mkdir(parents=True)
    (broken / ".lock").touch()
    (broken / "checkpoints").write_text("in the way")
    (ended,) = train(ranks, path)
    assert ended.startswith("2: 1 of 2 members ended early. first: ") and "cannot be written" in ended
    assert (run / "slow" / "finished.json").exists() and not (broken / "finished.json").exists()
    if ranks == 2:
        assert rows(run / "slow") == rows(folder / "two" / "slow")
    (broken / "checkpoints").unlink()
    assert train(2, path) == ["0"]
    assert (broken / "finished.json").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [("stage3", "ZeRO stage 3 splits the frozen base for one model alone"), ("twice", "2 in twice and 1 in first")],
)
def test_what_cannot_share_a_base_is_refused_in_one_line(folder, name, words):
    ended = (folder / f"{name}.code").read_text()
    assert ended.startswith("2: ") and words in ended and "\n" not in ended


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["several sources", "accumulation", "retrieval", "bfloat16", "packed"])
def test_a_member_is_its_run_alone_for_other_backbones_tasks_and_precisions(tmp_path, kind):
    raw = yaml.safe_load(tiny_kinds.prepare(tmp_path, kind).read_text())
    raw["engine"] |= {"deepspeed": "ds_configs/zero2.json"}
    raw["run_dir"] = str(tmp_path / "many")
    other = {"name": "adapter", "r": 4} if raw["method"]["name"] == "lora" else LORA
    members = [
        {"name": "one"},
        {"name": "slow", "optim": {"lr": 0.003}, "seed": 9},
        {"name": "other", "method": other},
    ]
    (tmp_path / "many.yaml").write_text(yaml.safe_dump(raw | {"study": members}))
    names = [member["name"] for member in members]
    study = tmp_path / "many.yaml"
    assert train(2, study, *(write_alone(study, name) for name in names)) == ["0"] * (1 + len(names))
    for name in names:
        assert_equal_runs(tmp_path / "many" / name, tmp_path / f"many-{name}-alone")


@pytest.mark.slow
def test_a_stop_request_saves_every_member_and_the_same_command_goes_on(folder):
    paths = [write_study(folder, name, 1, MEMBERS[:3], optim={"epochs": 8}) for name in ("stopped", "undisturbed")]
    with launch.Launch("launchers/study.py", "--recipe", str(paths[0])) as running:
        assert running.wait_for("seeded: step 5", 200)
        running.ranks()[1].terminate()
        result = running.wait(120)
    assert result.code == 0 and result.output.count("the same command continues it") == 3, result.tail()
    saved = [len(rows(folder / "stopped" / m["name"])) for m in MEMBERS[:3]]
    assert max(saved) - min(saved) <= 1 and max(saved) < 8 * STEPS
    assert not (folder / "stopped" / "study.md").exists()
    assert train(2, *paths) == ["0", "0"]
    for member in MEMBERS[:3]:
        assert_equal_runs(folder / "stopped" / member["name"], folder / "undisturbed" / member["name"])


@pytest.mark.slow
@pytest.mark.parametrize("option", ["cache_frozen", "gradient_checkpointing", "tower_batch"])
def test_options_of_the_engine_work_in_a_study_as_alone(folder, option):
    value = {"cache_frozen": {"dir": str(folder / "store")}, "gradient_checkpointing": True, "tower_batch": 4}[option]
    study = write_study(folder, option, 0, MEMBERS[:2], engine={option: value, "train_dropout": False})
    assert train(2, study, *(write_alone(study, name) for name in NAMES[:2])) == ["0"] * 3
    for name in NAMES[:2]:
        assert_equal_runs(folder / option / name, folder / f"{option}-{name}-alone")
    alone = max(int((folder / f"{option}-{name}-alone.calls").read_text()) for name in NAMES[:2])
    calls = int((folder / f"{option}.calls").read_text())
    assert calls == alone if option != "cache_frozen" else calls > 0


@pytest.mark.slow
def test_methods_of_several_kinds_and_inside_the_tower_are_each_as_alone(folder):
    inside = {"target_modules": r".*vision_model.*layers?\.1\..*(query|q_proj)"}
    members = [
        {"name": "text"},
        {"name": "tower", "method": inside},
        {"name": "tower_r3", "method": inside | {"r": 3}},
        {"name": "bits", "method": {"name": "bitfit"}},
        {"name": "prompt", "method": {"name": "deep_prompt", "style": "prefix"}},
    ]
    names = [member["name"] for member in members]
    study = write_study(folder, "kinds", 1, members, engine={"train_dropout": False})
    assert train(2, study, *(write_alone(study, name) for name in names)) == ["0"] * (1 + len(names))
    for name in names:
        assert_equal_runs(folder / "kinds" / name, folder / f"kinds-{name}-alone")
    alone = int((folder / "kinds-text-alone.calls").read_text())
    assert int((folder / "kinds.calls").read_text()) == 3 * alone  # of those inside it each runs the tower itself
