"""Credentials of URLs are masked wherever they could be read; an adapter directory holds no path of this machine."""

import ast
import logging
import os
import shutil

import pytest
import yaml

from mmpeft_ds import adapter, adapter_files, console, redaction
from mmpeft_ds import recipe as recipes
from mmpeft_ds.engine.rundir import RunDir
from mmpeft_ds.errors import BadInput
from tests.helpers import ROOT
from tests.helpers.runs import tiny_adapters

SECRET = "s3cr3t"


@pytest.mark.parametrize(
    "url",
    [
        "https://alice:s3cr3t@host/data",
        "s3://s3cr3t@bucket/data",
        "https://host/data?X-Amz-Signature=s3cr3t&part=1",
        "https://host/data?part=1&access_token=s3cr3t",
        "hf_s3cr3ts3cr3t",
    ],
)
def test_credentials_are_masked_in_any_text_and_nothing_else(url):
    text = redaction.masked(f"{url}/manifest.json: not found")
    assert SECRET not in text and "***" in text and text.endswith("not found")
    assert "part=1" in text or "part=1" not in url


@pytest.mark.parametrize("text", ["https://host/data?part=1", "runs/a@b", "s3://bucket/key=1", "C: a/b?"])
def test_texts_without_credentials_stay(text):
    assert redaction.masked(text) == text


def test_a_command_prints_none_whatever_it_ends_with(monkeypatch, capsys, caplog):
    monkeypatch.setattr("sys.excepthook", None)
    before = logging.getLogRecordFactory()
    try:

        def main():
            logging.getLogger("fsspec").warning("%s again", f"https://a:{SECRET}@h/x")
            raise BadInput(f"https://a:{SECRET}@host/manifest.json: not found")

        with pytest.raises(SystemExit):
            console.run(main)
        import sys

        try:
            raise RuntimeError(f"https://a:{SECRET}@host")
        except RuntimeError:
            sys.excepthook(*sys.exc_info())
    finally:
        logging.setLogRecordFactory(before)
    printed = capsys.readouterr()
    assert SECRET not in printed.out + printed.err + caplog.text
    assert "https://***@host/manifest.json" in printed.err and "RuntimeError: https://***@host" in printed.err
    assert "https://***@h/x again" in caplog.text


def test_recipes_are_recorded_without_and_continue_with_them(tmp_path):
    recipe = recipes.from_dict({
        "run_dir": str(tmp_path / "run"),
        "backbone": {"name": "dual_encoder"},
        "method": {"name": "lora"},
        "data": {"sources": [{"dir": f"https://a:{SECRET}@host/d", "task": {"name": "retrieval"}}]},
    })  # fmt: skip
    assert SECRET not in recipes.to_yaml(recipe)
    for _ in range(2):
        opened = RunDir.open(recipe.run_dir, recipes.to_dict(recipe))
        opened.close()
    assert SECRET not in (tmp_path / "run" / "recipe.yaml").read_text()


@pytest.mark.parametrize("kind", ["vqa", "classification on stored features"])
def test_an_adapter_directory_says_nothing_of_this_machine_and_finds_its_base(tmp_path, monkeypatch, kind):
    directory = tiny_adapters.export(tmp_path, kind)
    for file in directory.iterdir():
        content = file.read_bytes()
        for word in (str(tmp_path), os.uname().nodename, os.path.expanduser("~/")):
            assert word.encode() not in content, f"{file.name} holds {word}"
    adapter.load(directory)
    moved = tmp_path / "far" / "away" / "adapter"
    shutil.copytree(directory, moved)
    adapter.load(moved)  # by what this user's cache remembers
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "of another user"))
    if kind == "vqa":
        with pytest.raises(BadInput, match="no directory"):
            adapter.load(moved)
        monkeypatch.setenv(redaction.BASES, str(tmp_path))
    adapter.load(moved)


def test_a_base_on_another_disk_is_a_name_that_the_recipe_of_the_run_completes(tmp_path):
    kept = redaction.portable({"text": "/usr/lib", "image_size": 8, "hub": "org/name"}, tmp_path / "run" / "adapter")
    assert kept.pop("text").startswith("{base}/lib#") and kept == {"image_size": 8, "hub": "org/name"}
    kept = {"text": "{base}/lib#"}
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump({"backbone": {"text": "/usr/lib"}}))
    assert redaction.found(kept, tmp_path / "run" / "adapter")["text"] == "/usr/lib"


def test_a_file_that_checksums_leave_out_is_damage(tmp_path):
    directory = tiny_adapters.export(tmp_path, "vqa")
    (directory / "notes.txt").write_text("mine")
    adapter_files.whole(directory)
    (directory / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(BadInput, match=r"adapter_model\.bin: checksums\.json leaves it out"):
        adapter_files.whole(directory)


@pytest.mark.parametrize(
    "content", ['{"mean": "a", "std": [1.0]}', '{"mean": [NaN], "std": [1]}', "[1]", '{"mean": [1], "std": []}']
)
def test_statistics_of_another_type_are_refused_also_where_they_are_not_used(tmp_path, content):
    (tmp_path / "feature_statistics.json").write_text(content)
    with pytest.raises(BadInput, match="feature_statistics.json"):
        adapter_files.read_statistics(tmp_path)


def test_no_class_of_transformers_asks_whether_foreign_code_may_run():
    for path in (ROOT / "mmpeft_ds").rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)):
                continue
            owner = getattr(call.func.value, "id", "")
            if owner.startswith("Auto") and call.func.attr in ("from_pretrained", "from_config"):
                given = {word.arg: word.value for word in call.keywords}
                assert "trust_remote_code" in given, f"{path}:{call.lineno}"
                assert given["trust_remote_code"].value is False
