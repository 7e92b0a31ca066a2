"""The method comparison as a user starts it; tests/runs/test_comparison.py has its parts."""

import importlib
import json
import socket
import subprocess
import sys

import pytest

from mmpeft_ds.errors import BadInput
from tests.helpers import ROOT, commands
from tests.helpers.launch import environment
from tests.helpers.runs import tiny_adapters, tiny_vqa

# What the reader of peft's method comparison takes from each part.
RUN = {"created_at", "total_time", "experiment_name", "peft_branch", "train_config", "peft_config", "error_msg"}
TRAIN = {
    "accelerator_memory_reserved_avg", "accelerator_memory_max", "accelerator_memory_reserved_99th", "train_time",
    "file_size", "num_trainable_params", "num_total_params", "status", "metrics",
}  # fmt: skip
LAST = {"test accuracy", "train loss", "train samples", "train total tokens", "forgetting"}
PACKAGES = {f"{name}-version" for name in ("transformers", "peft", "datasets", "bitsandbytes", "torch")}
METHODS = ("lora", "routed_lora:route=mul", "bitfit")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--recipe", "nothing.yaml"], "nothing.yaml: No such file"),
        (["--seeds", "0"], "--seeds: must be 1 or more"),
        (["--ranks", "-1"], "--ranks: must be 1 or more"),
        (["--recipe", "RECIPE", "--steps", "0"], "--steps: must be 1 or more"),
        (["--recipe", "RECIPE", "--second", "nowhere"], "nowhere"),
        (["--recipe", "RECIPE", "--second", "none", "--methods", "loar"], "Did you mean 'lora'?"),
        (["--recipe", "RECIPE", "--second", "none", "--set", "data.validation=[]"], "data.validation: empty"),
    ],
)
def test_what_cannot_be_compared_is_one_line_before_anything_runs(command, tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "call", None)
    tiny_vqa.prepare(tmp_path)
    words = [str(tmp_path / "recipe.yaml") if word == "RECIPE" else word for word in words]
    code, _, err = command("compare.py", "--out", tmp_path / "out", *words)
    assert code == 2 and err.count("\n") == 1 and says in err, err


def test_a_run_gets_a_free_port_that_the_system_gives_to_no_connection(monkeypatch):
    commands.path_to_replace(monkeypatch)
    run = importlib.import_module("launchers._run")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        other = taken.getsockname()[1]
        assert other not in run.PORTS, "under test: this machine gives other ports to connections"
        assert run.free_port() in run.PORTS
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port := run.free_port()))
        monkeypatch.setattr(run, "PORTS", range(port, port + 1))
        with pytest.raises(BadInput, match="is free"):
            run.free_port()


def compare(folder, *words, timeout=900):
    """Output of the launcher in a process of its own."""
    args = [
        "--recipe",
        str(folder / "recipe.yaml"),
        "--out",
        str(folder / "out"),
        "--steps",
        "4",
        "--evaluations",
        "2",
    ]
    args += ["--second", str(folder / "pictures"), "--second-split", "val", "--budget", "600", "--methods", *METHODS]
    done = subprocess.run(
        [sys.executable, str(ROOT / "launchers" / "compare.py"), *args, *words],
        cwd=folder,
        env=environment(DS_ACCELERATOR="cpu"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


@pytest.mark.slow
def test_rows_run_through_the_launcher_once_each_and_are_reported_in_pefts_form(tmp_path):
    tiny_vqa.prepare(tmp_path)
    tiny_adapters.write_pictures(tmp_path / "pictures")
    shown = compare(tmp_path, "--split", "val")
    results = {p.stem: json.loads(p.read_text()) for p in (tmp_path / "out" / "results").iterdir()}
    assert set(results) == {"lora-seed3", "routed_lora-mul-seed3", "bitfit-seed3"}
    for name, result in results.items():
        run, train, meta = result["run_info"], result["train_info"], result["meta_info"]
        assert train["status"] == "success" and run["error_msg"] == ""
        assert run["experiment_name"].endswith(f"/{name}") and run["train_config"]["max_steps"] == 4
        assert run["peft_config"]["peft_type"]
        weights = tmp_path / "out" / "runs" / name / "adapter" / "adapter_model.safetensors"
        assert train["file_size"] == weights.stat().st_size
        assert 0 < train["num_method_params"] < train["num_trainable_params"] < train["num_total_params"]
        assert 0 < train["accelerator_memory_reserved_avg"] <= train["accelerator_memory_max"]
        *evaluations, last = train["metrics"]
        assert [e["step"] for e in evaluations] == [2, 4] and "valid accuracy" in evaluations[0]
        report = json.loads((tmp_path / "out" / "runs" / name / "evaluation-val.json").read_text())
        assert last["test accuracy"] == report[0]["scores"]["accuracy"] and last["split"] == "val"
        second = last["second task"]
        assert last["forgetting"] == second["after"]["loss"] - second["before"]["loss"]
        assert run.keys() >= RUN and train.keys() >= TRAIN and last.keys() >= LAST
        assert meta["package_info"].keys() >= PACKAGES and "model_id" in run["train_config"]
        assert "node" not in meta["system_info"]
        assert str(tmp_path) not in json.dumps(result), "paths of this machine are nobody's business"
    assert (tmp_path / "out" / "pareto.png").is_file() and "routed_lora-mul" in shown
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("metrics.jsonl")}
    (tmp_path / "out" / "results" / "bitfit-seed3.json").unlink()
    shown = compare(tmp_path, "--split", "val", "--seeds", "2")
    assert "bitfit, seed 3" in shown and "bitfit, seed 4" in shown and "lora, seed 3\n" not in shown
    assert {p: p.stat().st_mtime_ns for p in before} == before, "a run that is done is not trained again"
    assert len(list((tmp_path / "out" / "results").iterdir())) == 6 and "±" in shown
