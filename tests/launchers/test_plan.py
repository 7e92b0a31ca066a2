"""launchers/plan.py as a user types it: tables, numbers, a file that train.py takes, one line for what is wrong."""

import json

import pytest

from tests.helpers.runs import tiny_vqa

MACHINES = ("--nodes", 2, "--gpus-per-node", 2, "--hbm", 16)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    tiny_vqa.prepare(folder)
    return folder / "recipe.yaml"


def test_a_plan_is_printed_written_and_taken_by_train(command, recipe, tmp_path):
    chosen, numbers = tmp_path / "ds.json", tmp_path / "plan.json"
    code, out, _ = command("plan.py", "--recipe", recipe, *MACHINES, "--apply", chosen, "--json", numbers)
    assert code == 0 and not (recipe.parent / "run").exists()
    for words in ("Memory of a GPU", "activations recomputed", "Received by a GPU", "Estimated seconds", "Recommended",
                  "Assumed, not measured", "samples run out from 7 GPUs on"):  # fmt: skip
        assert words in " ".join(out.split()), words
    plan = json.loads(numbers.read_text())
    written = json.loads(chosen.read_text())
    assert written["zero_optimization"] == plan["recommended"]["zero_optimization"]
    changed = ("--set", f"engine.deepspeed={chosen}")
    code, out, _ = command("train.py", "--recipe", recipe, *changed, "--check")
    assert code == 0 and f"ZeRO-{written['zero_optimization']['stage']}" in out


def test_numbers_alone_are_printed_for_machines(command, recipe):
    code, out, _ = command("plan.py", "--recipe", recipe, *MACHINES, "--json", "-")
    plan = json.loads(out)
    assert code == 0 and plan["cluster"]["ranks"] == 4 and plan["samples_per_micro_step"] == 2
    assert {c["name"] for c in plan["choices"]} >= {"zero0", "zero1", "zero2", "zero3", "zero3_nodes", "zero3_offload"}
    assert plan["counts"]["kept"]["flops"]["float32"] > plan["counts"]["kept"]["forward_flops"]["float32"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--nodes", "0", "--gpus-per-node", "8"), ("--nodes", "1 or more")),
        (("--nodes", "many", "--gpus-per-node", "8"), ("--nodes", "invalid int")),
        (("--gpus-per-node", "8"), ("--nodes",)),
        (("--nodes", "1", "--gpus-per-node", "8", "--hbm", "0"), ("--hbm", "above 0")),
        (("--nodes", "1", "--gpus-per-node", "8", "--card", "a1000"), ("--card", "h100")),
        ((*MACHINES, "--image-size", "big"), ("--image-size", "480x640")),
        ((*MACHINES, "--texts-per-sample", "0"), ("--texts-per-sample", "1 or more")),
        ((*MACHINES, "--apply", "no/such/place/ds.json"), ("no/such/place/ds.json", "folder")),
        ((*MACHINES, "--set", "optim.lrr=1"), ("optim.lrr",)),
        ((*MACHINES, "--set", "engine.deepspeed=zero9.json"), ("zero9.json",)),
    ],
)
def test_what_cannot_be_planned_is_one_line_and_exit_code_2(command, recipe, arguments, words):
    code, _, err = command("plan.py", "--recipe", recipe, *arguments)
    assert code == 2 and err.count("\n") == 1 and err.startswith("error: ")
    assert all(word in err for word in words), err


def test_where_nothing_fits_no_file_is_written(command, recipe, tmp_path):
    small = ("--nodes", 1, "--gpus-per-node", 2, "--hbm", 1.001)
    code, out, err = command("plan.py", "--recipe", recipe, *small, "--apply", tmp_path / "ds.json")
    assert code == 2 and "nothing fits" in out and "none was written" in err and not list(tmp_path.iterdir())
