"""The header of a recipe holds the commands from the publishers' files to the score, and they work in turn.

Each setting is carried out in small: on a miniature of the official layout, with tiny random weights, for two steps.
"""

import json
import re

import pytest

from mmpeft_ds import recipe as recipes
from mmpeft_ds.runs import submission
from mmpeft_ds.runs.evaluate import named
from tests.helpers import ROOT
from tests.helpers.runs.headers import BadHeader, commands, settings
from tests.helpers.runs.tiny_settings import Small, carry_out

# Recipes of your own data, and those whose data come as packages: other tests carry them out.
OTHERS = {
    "align_emoji", "answering_easy_vqa", "captioning_openclipart", "captioning_own", "captioning_own_packaged",
    "classification_own", "few_shot_emoji", "quickstart", "retrieval_openclipart", "retrieval_own",
}  # fmt: skip
RECIPES = sorted(p for p in (ROOT / "recipes").glob("*.yaml") if p.stem not in OTHERS)
SETTINGS = [setting for path in RECIPES for setting in settings(path)]
# Those over a quantised base need packages of their own: tests/quantised/test_recipe.py carries them out.
PLAIN = [s for s in SETTINGS if not any("quantise=" in value for value in s.train.values("--set"))]
# One of each task.
QUICK = {
    "aurora_flickr30k": "retrieval",
    "clip_bart_multitask_lora": "answering",
    "ga_net_pets": "classification",
    "lora_llava15_instruct": "instruction",
    "p_adapter_blip_snli_ve": "vqa_generative",
    "p_adapter_blip_textcaps": "captioning",
    "routed_lora_vqav2_roberta": "vqa",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("quick")


@pytest.fixture(scope="module")
def quick(folder, models):
    """Run directories of the quick settings, all from one process: starting one takes longer than a setting."""
    return carry_out([s for s in SETTINGS if str(s) in QUICK], folder, models)


def check_results(setting, run):
    """Two steps were taken, and every evaluation of the header left its scores and its result file."""
    latest = (run / "checkpoints" / "latest").read_text()
    assert int(re.sub(r"\D", "", latest)) == 2 and (run / "finished.json").is_file()
    for command in (c for c in setting.after if c.name == "evaluate"):
        (split,) = command.values("--split")
        (form, *_) = *command.values("--submission"), ""
        sources = recipes.load(setting.recipe, setting.train.values("--set")).data.sources
        name = named(split, sources, command.values("--data"))
        for report in json.loads((run / f"evaluation-{name}.json").read_text()):
            assert report["rows"] > 0 and report["bad_samples"] == 0
            assert bool(report["vqa_measure"]) == (report["task"] in ("answering", "vqa", "vqa_generative"))
        if form:
            written = run / submission.file_name(form, name)
            assert written.read_text().strip() not in ("", "[]")


@pytest.mark.distributed
@pytest.mark.parametrize("setting", [s for s in SETTINGS if str(s) in QUICK], ids=str)
def test_the_commands_of_a_header_lead_from_the_layout_to_the_score(setting, quick):
    assert str(setting) in quick, "a command failed, see the output of the fixture"
    check_results(setting, quick[str(setting)])


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("setting", [s for s in PLAIN if str(s) not in QUICK], ids=str)
def test_so_do_those_of_all_other_headers(setting, tmp_path, models):
    check_results(setting, carry_out([setting], tmp_path, models)[str(setting)])


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_write_the_same_answers_and_result_files_as_one(quick, folder, models, tmp_path):
    names = ("clip_bart_multitask_lora", "lora_llava15_instruct", "p_adapter_blip_textcaps")
    for setting in (s for s in SETTINGS if str(s) in names):
        small = Small(setting, folder / str(setting), models)
        one, two = (small.evaluated(n, tmp_path / "jobs.json", "--set", "data.evaluation_batch=1") for n in (1, 2))
        assert one == two and len(one) >= 1, setting


def test_every_task_has_a_setting_that_the_quick_tests_carry_out():
    of_setting = {str(s): {e.task["name"] for e in recipes.load(s.recipe).data.sources} for s in SETTINGS}
    assert all(task in of_setting[name] for name, task in QUICK.items())
    assert set(QUICK.values()) == set().union(*of_setting.values())


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_a_setting_evaluates_the_run_that_it_trains_on_the_data_that_it_prepares(setting):
    recipe = recipes.load(setting.recipe, setting.train.values("--set"))
    made = {out for command in setting.before for out in command.values("--out")}
    assert {source.dir for source in (*recipe.data.sources, *recipe.data.validation)} <= made
    assert {run for command in setting.after for run in command.values("--run")} == {recipe.run_dir}


def test_settings_have_runs_of_their_own():
    runs = [str(setting) for setting in SETTINGS]
    assert len(set(runs)) == len(runs) > 15


PREPARE = "#   python data_prep/prepare.py coco-captions --root DATA/coco --out data/coco\n"
TRAIN = "#   deepspeed --num_gpus 8 launchers/train.py \\\n#       --recipe recipes/a.yaml\n"
EVALUATE = "#   deepspeed launchers/evaluate.py --run runs/a --split test\n"


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ("# About a recipe.\n", "no command that trains"),
        ("# python launchers/train.py --recipe recipes/a.yaml\n", "no command that trains"),  # in running text
        (TRAIN + EVALUATE, "no command that prepares"),
        (PREPARE + TRAIN, "no command that evaluates"),
        (PREPARE + TRAIN.replace("a.yaml", "b.yaml") + EVALUATE, "trains another recipe"),
        (PREPARE + TRAIN + EVALUATE + PREPARE, "nothing trains on what"),
        ("#   python make it so\n", "starts no script"),
    ],
)
def test_a_header_that_leads_to_no_score_is_noticed(tmp_path, header, words):
    path = tmp_path / "a.yaml"
    path.write_text(header + "\nrun_dir: runs/a\n#   python launchers/evaluate.py --run runs/a --split val\n")
    with pytest.raises(BadHeader, match=words):
        settings(path)


def test_a_whole_header_is_read_with_its_continued_lines(tmp_path):
    (tmp_path / "a.yaml").write_text("# About.\n#\n" + PREPARE + TRAIN + "#\n" + EVALUATE + "\nrun_dir: runs/a\n")
    (setting,) = settings(tmp_path / "a.yaml")
    assert setting.train.args == ("--recipe", "recipes/a.yaml") and setting.after[0].values("--split") == ["test"]
    assert [c.name for c in commands((tmp_path / "a.yaml").read_text())] == ["prepare", "train", "evaluate"]
