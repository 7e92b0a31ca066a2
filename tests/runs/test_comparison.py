"""Rows, results and reports of a method comparison, without a run; tests/launchers/test_compare.py starts one."""

import json
import math
from itertools import combinations

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmpeft_ds import methods
from mmpeft_ds import recipe as recipes
from mmpeft_ds.adapter_files import WEIGHTS, write_checksums
from mmpeft_ds.errors import BadInput
from mmpeft_ds.runs.comparison import forgetting, report, rows
from mmpeft_ds.runs.comparison.study import Comparison, Settings
from tests.helpers.runs import tiny_adapters, tiny_vqa


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny_vqa.prepare(folder)
    return tiny_vqa.recipe(folder, engine={"deepspeed": "ds_configs/zero1.json"})


@pytest.mark.parametrize("start", [4, 28, 64])
@pytest.mark.parametrize("budget", [1, 90, 1000, 4096])
@pytest.mark.parametrize("kind", ["rising", "falling", "cubic", "multiples of 4"])
def test_the_width_is_the_one_nearest_to_the_budget_of_all_that_can_be(kind, budget, start):
    def count(width):
        if kind == "multiples of 4" and width % 4:
            raise BadInput("no")
        return {"falling": 6000 // width, "cubic": width**3}.get(kind, 10 * width + 3)

    width, number = rows.nearest(count, start, budget)
    can = range(4, rows.WIDEST + 1, 4) if kind == "multiples of 4" else range(1, rows.WIDEST + 1)
    assert number == count(width) and abs(number - budget) == min(abs(count(w) - budget) for w in can)


def test_widths_that_cannot_be_end_the_search_soon():
    tried = []

    def count(width):
        tried.append(width)
        if 32 % width:
            raise BadInput("no")
        return 1000 - width

    assert rows.nearest(count, 8, 1) == (32, 968) and len(tried) < 60
    with pytest.raises(BadInput):
        rows.nearest(count, 7, 1)


def test_every_method_inside_the_model_has_a_row_and_widths_reach_the_budget(tiny):
    specs = rows.usual()
    assert {spec.partition(":")[0] for spec in specs} == set(methods.names(heads=False)) - {"peft"}
    budget, fitted = 700, {}
    for spec in ("lora", "routed_lora:route=mul", "deep_prompt", "bitfit"):
        row = fitted[spec] = rows.fit(spec, tiny, budget, 0.2)
        assert row.trained == rows.trained_of(tiny, row.method)
    assert fitted["bitfit"].width == "" and not fitted["bitfit"].within
    assert all(abs(row.trained - budget) <= 0.2 * budget for row in fitted.values() if row.within)
    assert sum(row.within for row in fitted.values()) >= 2
    lora = fitted["lora"].method
    assert lora["lora_alpha"] == lora["r"], "what is added is scaled as by default, whatever the width"
    routed = fitted["routed_lora:route=mul"].method
    assert routed["train_norms"] is True and routed["alpha"] / routed["r"] == 2, (
        "the recipe's own method keeps options"
    )
    given = rows.fit("lora:r=3", tiny, budget, 0.2)
    assert given.method["r"] == 3 and given.width == "", "a width that is given stays"


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("loar", "no method named 'loar'"),
        ("lora:rank=3", "'rank=3' is no option=value of lora"),
        ("lora:r", "'r' is no option=value of lora"),
        ("tip_adapter", "launchers/few_shot.py"),
        ("peft", "type"),
        ("moka", "no language model"),
    ],
)
def test_a_row_that_cannot_be_is_refused_where_it_is_asked_for(tiny, tmp_path, spec, says):
    with pytest.raises(BadInput, match=says) as problem:
        Comparison.open(tmp_path / "out", tiny, Settings(budget=500), [spec])
    assert "\n" not in str(problem.value)


def test_a_comparison_goes_on_with_its_own_settings_alone(tiny, tmp_path):
    first = Comparison.open(tmp_path, tiny, Settings(steps=4), ["bitfit"])
    assert first.settings.budget == rows.trained_of(tiny, tiny.method), "the recipe's own method sets the budget"
    more = Comparison.open(tmp_path, tiny, Settings(steps=4), ["layer_norm", "bitfit"])
    assert [row.name for row in more.rows] == ["layer_norm", "bitfit"] and more.rows[1] == first.rows[0]
    with pytest.raises(BadInput, match="another steps"):
        Comparison.open(tmp_path, tiny, Settings(steps=5), ["bitfit"])
    (tmp_path / "comparison.json").write_text("{")
    with pytest.raises(BadInput, match="Remove it, or give another --out"):
        Comparison.open(tmp_path, tiny, Settings(steps=4), ["bitfit"])
    with pytest.raises(BadInput, match="twice"):
        Comparison.open(tmp_path / "new", tiny, Settings(steps=4), ["bitfit", "bitfit"])


def test_a_row_that_fails_is_written_down_and_one_that_was_stopped_is_not(tiny, tmp_path):
    made, started = Comparison.open(tmp_path, tiny, Settings(steps=4), ["bitfit", "layer_norm"]), []

    def ending_in(code):
        return lambda *words: started.append(words) or code

    assert made.run(1, ending_in(0)) == (0, False), "the run ended without a result: somebody stopped it"
    assert not list((tmp_path / "results").iterdir())
    assert made.run(1, ending_in(2)) == (2, False) and len(started) == 2, "what fails first may fail for all rows"
    (failed,) = (tmp_path / "results").iterdir()
    assert json.loads(failed.read_text())["train_info"]["status"] == "failed"
    other = tmp_path / "results" / "layer_norm-seed3.json"
    other.write_text(json.dumps(entry("layer_norm", 0.5)))
    assert made.run(1, ending_in(2)) == (1, False) and "bitfit" in started[-1][-1], "the others are done all the same"
    failed.unlink()
    assert made.run(1, ending_in(-15)) == (-15, False), "a signal ends the comparison"
    words = started[-1]
    assert words[:2] == ("launchers/train.py", "--recipe") and recipes.load(words[2]).method["name"] == "bitfit"


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"evaluations": 0}, {"budget": -1}, {"tolerance": 1.0}])
def test_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(BadInput, match=f"--{next(iter(wrong))}"):
        Settings(**wrong)


def test_contrast_of_equal_and_of_shuffled_pairs():
    vectors = torch.eye(8)
    same = forgetting.contrast(3 * vectors, vectors)
    assert same["recall@1"] == 1 and same["loss"] == pytest.approx(math.log1p(7 * math.exp(-20)), abs=1e-6)
    shifted = forgetting.contrast(vectors, vectors.roll(1, 0))
    assert shifted["recall@1"] == 0 and shifted["loss"] > 19


@pytest.mark.parametrize(
    ("kind", "task"), [("vqa", "texts"), ("answering", "captions"), ("retrieval with clip", "pairs")]
)
def test_forgetting_is_the_loss_that_an_adapter_adds(tmp_path, kind, task):
    directory, data = tiny_adapters.export(tmp_path, kind), str(tmp_path / "data")
    found = forgetting.measure(directory, data, "val", 4)
    assert found["task"] == task and found["samples"] == 4 and abs(found["forgetting"]) > 1e-6
    assert found["forgetting"] == found["after"]["loss"] - found["before"]["loss"]
    again = forgetting.measure(directory, data, "val", 4, batch=3)
    assert again["before"]["loss"] == pytest.approx(found["before"]["loss"], abs=1e-5)
    assert again["after"]["loss"] == pytest.approx(found["after"]["loss"], abs=1e-5)
    erase(directory)
    assert forgetting.measure(directory, data, "val", 4)["forgetting"] == pytest.approx(0, abs=1e-6)
    with pytest.raises(BadInput, match="2 are the least"):
        forgetting.measure(directory, data, "val", 1)


def erase(directory):
    """Take the change out of an exported LoRA."""
    tensors = load_file(directory / WEIGHTS)
    for name, tensor in tensors.items():
        tensor.mul_("lora_B" not in name)
    save_file(tensors, directory / WEIGHTS, {"format": "pt"})
    write_checksums(directory)


def entry(name, score, *, size=1000, forgets=None, status="success", seed=0):
    last = {"metric": "accuracy", "split": "val", "test accuracy": score, "train loss": 1.0, "step time": 0.5}
    last |= {"scored": "9 of 10 samples"} if name != "weak" else {}
    if forgets is not None:
        second = {"data": "toy-test", "task": "texts", "samples": 9, "before": {"loss": 3.0}}
        last |= {"forgetting": forgets, "second task": second}
    budget = {"width": "r 4", "within": name != "off", "parameters": 500, "tolerance": 0.1}
    train = {"status": status, "metrics": [last], "budget": budget, "num_method_params": 500, "train_time": 1.0}
    train |= {"num_trainable_params": 600, "file_size": size, "accelerator_memory_max": 1 << 30}
    return {
        "run_info": {"row": name, "created_at": f"{seed}", "experiment_name": f"{name}-{seed}"},
        "train_info": train,
    }


def test_the_table_has_the_best_first_and_says_what_is_off_the_budget(tmp_path):
    results = [
        entry("weak", 0.5, size=900, forgets=0.2),
        entry("strong", 0.7, forgets=0.1),
        entry("strong", 0.9, seed=1, forgets=0.3),
        entry("off", 0.6, size=2000),
        entry("broken", 0.0, status="failed"),
    ]
    (tmp_path / "results").mkdir()
    for number, result in enumerate(results):
        (tmp_path / "results" / f"{number}.json").write_text(json.dumps(result))
    text = report.write(tmp_path, {"moka": "no language model"})
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["**strong**", "off", "**weak**"]
    assert "0.8000 ± 0.141" in lines[2] and "+0.200 ± 0.141" in lines[2] and "off the budget" in lines[3]
    scored = [line.split("|")[6].strip() for line in (lines[0], *lines[2:])]
    assert scored == ["scored", "9 of 10 samples", "9 of 10 samples", "-"], "results of before do not say it"
    assert "toy-test" in text and "`moka`: no language model" in text and "broken" not in text
    assert (tmp_path / "table.md").read_text() == text
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_no_row_of_the_front_is_beaten_and_every_other_is():
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(0, 6, (20, 2), generator=generator).tolist()
    made = [{"name": str(i), "scores": [score], "bytes": size} for i, (score, size) in enumerate(numbers)]
    front = report.pareto(made, "bytes")

    def beats(one, other):
        better = (one["scores"][0] - other["scores"][0], other["bytes"] - one["bytes"])
        return min(better) >= 0 and max(better) > 0

    for row in made:
        assert (row["name"] in front) != any(beats(other, row) for other in made)
    assert not any(beats(a, b) or beats(b, a) for a, b in combinations([r for r in made if r["name"] in front], 2))


def test_without_a_row_there_is_a_sentence_and_no_plot(tmp_path):
    assert "No row" in report.write(tmp_path, {})
    assert not (tmp_path / "pareto.png").exists()
