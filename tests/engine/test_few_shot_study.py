"""Few-shot studies: what a recipe becomes, that finished runs are not done again, and what the tables say."""

import csv
import io
import json

import pytest
import yaml

from mmpeft_ds import recipe as recipes
from mmpeft_ds.errors import BadInput
from mmpeft_ds.runs import few_shot, few_shot_report, few_shot_study
from mmpeft_ds.runs.few_shot_study import Study
from tests.helpers import ROOT, commands
from tests.helpers.runs import tiny_study


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return tmp_path_factory.mktemp("few_shot")


@pytest.fixture
def study(toy, tmp_path):
    def make(**changes):
        given = tiny_study.recipe(toy, run_dir=str(tmp_path / "study"))
        section = changes.pop("few_shot", {})
        return Study.load(
            tiny_study.write(tmp_path / "s.yaml", {**given, **changes, "few_shot": {**given["few_shot"], **section}})
        )

    return make


def test_cells_are_methods_times_shots_times_seeds_with_their_own_subsets_and_settings(study):
    cells = study().cells()
    assert [(c.method, c.shots, c.seed) for c in cells] == [
        ("Zero shot", 2, 1),  # knows neither shots nor seeds
        *[("TaskRes", shots, seed) for shots in (1, 2) for seed in (1, 2)],
    ]
    last = cells[-1].recipe
    assert last.data.sources[0].subset == "few_shot/2-seed2.json"
    assert last.data.validation[0].subset == "few_shot/2-seed2-val.json"
    assert last.data.sources[0].dir.endswith("plain-one") and cells[-1].tests[1].dir.endswith("moved-one")
    assert last.seed == 2 and last.optim.lr == 0.02 and cells[1].recipe.optim.lr == 0.01
    assert last.engine.eval_every == few_shot_study.NEVER  # nothing is chosen by validation
    assert study(few_shot={"select": "best"}).cells()[-1].recipe.engine.eval_every == 0
    assert len({cell.path for cell in cells}) == len(cells)


def test_a_row_that_reads_pictures_takes_the_data_set_that_the_features_were_made_of():
    given = {"dir": "data/emoji-{features}", "tests": ["data/{features}/x", 3]}
    assert few_shot_study.with_features(given, "aligned") == {
        "dir": "data/emoji-aligned",
        "tests": ["data/aligned/x", 3],
    }
    assert few_shot_study.with_features({"dir": "data/emoji-{features}"}, "pictures") == {"dir": "data/emoji"}


def test_base_classes_have_runs_of_their_own_scored_on_the_first_test_set(study):
    cells = study(few_shot={"base_to_new": [2]}).cells()
    halves = [c for c in cells if c.half == "base"]
    assert [(c.method, c.shots, c.seed) for c in halves] == [("Zero shot", 2, 1), ("TaskRes", 2, 1), ("TaskRes", 2, 2)]
    assert halves[-1].recipe.data.sources[0].subset == "few_shot/2-seed2-base.json"
    assert [t.name for t in halves[-1].tests] == ["plain"]


def test_a_component_of_another_name_replaces_the_common_one_and_of_the_same_name_adds_to_it():
    below = {"backbone": {"name": "features", "texts": "none"}, "optim": {"lr": 1, "clip": 2}}
    same = few_shot_study.deep_merge(below, {"backbone": {"name": "features", "images": "live"}, "optim": {"lr": 3}})
    assert same == {"backbone": {"name": "features", "texts": "none", "images": "live"}, "optim": {"lr": 3, "clip": 2}}
    assert few_shot_study.deep_merge(below, {"backbone": {"name": "clip"}})["backbone"] == {"name": "clip"}
    assert below["optim"] == {"lr": 1, "clip": 2}


def test_a_part_of_a_study_is_named_by_its_own_words(study):
    part = study().only(["TaskRes"], [2], [1])
    assert [(c.method, c.shots, c.seed) for c in part.cells()] == [("TaskRes", 2, 1)]
    with pytest.raises(BadInput, match="--methods: 'CoOp'.*Known: Zero shot, TaskRes"):
        study().only(["CoOp"], [], [])
    with pytest.raises(BadInput, match="--shots: 16"):
        study().only([], [16], [])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"methods": []}, "methods"),
        ({"methods": [{"method": {"name": "task_res"}}]}, "methods"),
        ({"methods": [{"name": "A b", "method": {}}, {"name": "a-B", "method": {}}]}, "same name"),
        ({"methods": [{"name": "A"}]}, r"methods.0 \(A\).*'method' is missing"),
        ({"methods": [{"name": "A", "method": {}, "optym": {}}]}, "optym.*Did you mean 'optim'"),
        ({"few_shot": {"tests": []}}, "tests"),
        ({"few_shot": {"shot": [1]}}, "shot: unknown key"),
        ({"few_shot": {"select": "test"}}, "select"),
    ],
)
def test_a_study_that_cannot_work_is_refused_in_one_line(study, change, words):
    with pytest.raises(BadInput, match=words) as caught:
        study(**change).cells()
    assert "\n" not in str(caught.value) and "s.yaml" in str(caught.value)


def test_data_sets_that_are_not_prepared_are_named_once_each_before_anything_runs(study, toy, tmp_path, monkeypatch):
    made = study(few_shot={"tests": [{"name": name, "dir": str(tmp_path / name)} for name in ("a", "b")]})
    with pytest.raises(BadInput) as caught:
        few_shot.run(made)
    dirs = f"{tmp_path / 'a'}, {tmp_path / 'b'}"
    assert str(caught.value).startswith(f"not prepared, since they have no manifest.json: {dirs}. ")
    assert not made.out.exists()
    few_shot_study.check_prepared(study().cells())
    words = ["--recipe", str(tmp_path / "s.yaml"), "--check"]
    few_shot_py = ROOT / "launchers" / "few_shot.py"
    assert commands.run_script(few_shot_py, words, monkeypatch) == 0
    moved = ["--set", f"few_shot.tests.1.dir={tmp_path / 'b'}"]
    assert commands.run_script(few_shot_py, words + moved, monkeypatch) == 2


def test_files_of_chosen_samples_that_are_missing_are_named_once_each_before_anything_runs(study):
    made = study(few_shot={"shots": [2, 3], "seeds": [1]})
    (source,) = made.cells()[0].recipe.data.sources
    with pytest.raises(BadInput) as caught:
        few_shot.run(made)
    assert str(caught.value).startswith(f"no such subset file: {source.dir}/few_shot/3-seed1.json")
    assert str(caught.value).count("3-seed1.json") == 1 and not made.out.exists()


def test_the_study_runs_is_not_run_again_and_goes_on_where_a_result_is_missing(study, monkeypatch, capsys):
    made = study(few_shot={"base_to_new": [2]})
    assert few_shot.run(made)
    results = few_shot_study.results(made)
    assert len(results) == len(made.cells()) == 8
    said = capsys.readouterr().out.splitlines()
    assert len([line for line in said if "/8] " in line]) == 8 and "train: 1 of" not in "".join(said)
    whole = [r for r in results if r["half"] == "all"]
    assert all(set(r["tests"]) == {"plain", "moved"} for r in whole)
    assert all(r["tests"]["plain"]["samples"] == 30 and r["tests"]["moved"]["samples"] == 20 for r in whole)
    # the moved style knows four of the six classes, numbered the other way round; they meet by name
    assert all(r["tests"]["moved"]["accuracy"] > 0.4 for r in whole)
    assert set(results[-1]["tests"]) == {"plain base", "plain new"}
    assert [r["trainable_parameters"] for r in whole] == [0, 48, 48, 48, 48]
    assert whole[-1]["train_samples"] == 12 and whole[-1]["reads"] == "image"

    calls = []
    original = few_shot.trainer.run
    monkeypatch.setattr(few_shot.trainer, "run", lambda r, **more: calls.append(r.run_dir) or original(r, **more))
    assert few_shot.run(made) and not calls
    gone = made.cells()[3]
    (gone.path / few_shot_study.RESULT).unlink()
    assert few_shot.run(made) and calls == [str(gone.path)]
    assert few_shot_study.results(made) == results

    other = study(optim={"epochs": 3, "lr": 0.01})
    with pytest.raises(BadInput, match="TaskRes.*have changed"):
        few_shot.run(other.only(["TaskRes"], [], []))


def test_a_test_set_of_other_towers_or_classes_is_refused_with_the_cell_still_to_be_done(study, toy):
    if not (toy / "other-one").exists():
        tiny_study.write_style(toy / "other-one", "other", tiny_study.CLASSES, key="2" * 16)
        tiny_study.write_style(toy / "more-one", "more", [*tiny_study.CLASSES[:5], "hen"])
    made = study(few_shot={"tests": [{"name": "other", "dir": f"{toy}/other-one"}]}).only(["Zero shot"], [], [])
    with pytest.raises(BadInput, match="other towers"):
        few_shot.run(made)
    assert few_shot_study.results(made) == []


def result(method, shots, seed, accuracy, half="all", once=False, **tests):
    scores = tests or {"Fluent": {"accuracy": accuracy, "mean_class_accuracy": accuracy, "samples": 100}}
    return {
        "method": method, "shots": shots, "seed": seed, "half": half, "once": once, "reads": "image", "classes": 5,
        "train_samples": 5 * shots, "trainable_parameters": 10 * shots, "steps": 3, "tests": scores,
        "baselines": {name: {"majority": 0.2} for name in scores},
    }  # fmt: skip


def test_tables_say_mean_and_deviation_over_seeds_in_percent():
    results = [result("Zero", 16, 1, 0.5, once=True)]
    results += [result("Probe", k, s, a) for k, s, a in ((1, 1, 0.1), (1, 2, 0.3), (16, 1, 0.6), (16, 2, 0.6))]
    lines = few_shot_report.markdown(results).splitlines()
    assert lines[0] == "### Fluent (100 images)"
    assert lines[4:] == [
        "| Zero | image | 50.0 | 50.0 | 160 |",
        "| Probe | image | 20.0 ± 14.1 | 60.0 ± 0.0 | 160 |",
        "| most frequent class | - | 20.0 | 20.0 | - |",
    ]


def test_a_row_that_is_not_finished_shows_nothing_for_what_is_missing():
    results = [result("Zero", 1, 1, 0.5), result("Probe", 1, 1, 0.1), result("Probe", 2, 1, 0.2)]
    assert "| Zero | image | 50.0 |  | 10 |" in few_shot_report.markdown(results)


def test_base_to_new_has_the_harmonic_mean_of_each_seed():
    both = {name: {"accuracy": a, "samples": 10} for name, a in (("Fluent base", 0.8), ("Fluent new", 0.4))}
    text = few_shot_report.markdown([result("Probe", 16, 1, 0, half="base", **both)])
    assert "| Probe | 16 | 80.0 | 40.0 | 53.3 |" in text


def test_the_csv_has_a_line_a_run_and_test_set_and_the_plot_is_a_picture(tmp_path):
    results = [result("A", k, s, 0.1 * k, T1={"accuracy": 0.1 * k, "samples": 3}) for k in (1, 2) for s in (1, 2)]
    few_shot_report.write(tmp_path, results)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "results.csv").read_text())))
    assert len(rows) == 4 and rows[0]["test"] == "T1" and float(rows[-1]["accuracy"]) == pytest.approx(0.2)
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "results.md").read_text().startswith("### T1")


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("few_shot_*.yaml")), ids=lambda p: p.stem)
def test_a_shipped_study_is_valid_as_far_as_that_goes_without_its_data(path):
    from mmpeft_ds.engine.assembly import checks

    cells = Study.load(path).cells()
    assert {c.shots for c in cells} == {1, 2, 4, 8, 16} and {c.seed for c in cells} == {1, 2, 3}
    for cell in {c.method: c for c in cells}.values():
        checks.check_values(cell.recipe)
        recipes.filled(cell.recipe)
        chosen = [*cell.recipe.data.sources, *cell.recipe.data.validation]
        assert not any(source.split == "test" for source in chosen)
    assert f"launchers/few_shot.py --recipe recipes/{path.name}" in path.read_text().split("\nrun_dir")[0]
    assert json.loads(json.dumps(yaml.safe_load(path.read_text())))["few_shot"]["select"] == "last"
