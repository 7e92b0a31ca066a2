"""Adapter directories on their way to the hub: what is uploaded, what is refused, what happens without a network."""

import shutil
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file, save_file

from mmpeft_ds.adapter_files import CHECKSUMS, WEIGHTS, write_checksums
from mmpeft_ds.errors import BadInput
from mmpeft_ds.runs import push
from tests.helpers.runs import tiny_adapters


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny_adapters.export(tmp_path_factory.mktemp("push"), "instruction")


@pytest.fixture
def adapter(made, tmp_path):
    return shutil.copytree(made, tmp_path / "adapter")


@pytest.fixture
def hub(monkeypatch):
    """What was asked of the hub; set `answer` to an error to have it raised."""
    asked = {"answer": None}

    def create(self, repo, **options):
        asked["repo"], asked["private"] = repo, options["private"]
        if asked["answer"] is not None:
            raise asked["answer"]

    def upload(self, **options):
        asked["files"] = sorted(options["allow_patterns"])

    monkeypatch.setattr(HfApi, "create_repo", create)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    return asked


def answered(status):
    error = HfHubHTTPError.__new__(HfHubHTTPError)  # its response is of whatever client the hub's library uses
    error.response = SimpleNamespace(status_code=status)
    return error


def test_every_file_of_the_directory_goes_to_the_named_repository(adapter, hub, tmp_path):
    (adapter / ".hidden").write_text("mine")
    line = push.push(adapter, "me/thing", tmp_path / "out", private=True)
    assert line.startswith(f"{constants.ENDPOINT}/me/thing") and hub["private"] is True
    assert set(hub["files"]) == {path.name for path in adapter.iterdir()} - {".hidden"}
    assert {"README.md", "metrics.json", "base_fingerprint.json", "adapter_model.safetensors"} <= set(hub["files"])
    assert not (tmp_path / "out").exists()


def test_without_a_network_the_folder_is_written_and_the_command_is_said(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    line = push.push(adapter, "me/thing", tmp_path / "out")
    assert line.endswith(f"hf upload me/thing {tmp_path / 'out'} .")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in adapter.iterdir()}
    with pytest.raises(BadInput, match="out: exists"):
        push.push(adapter, "me/thing", tmp_path / "out")


def test_a_hub_that_does_not_answer_is_no_network(adapter, hub, tmp_path):
    hub["answer"] = ConnectionRefusedError("refused")
    assert "hf upload me/thing" in push.push(adapter, "me/thing", tmp_path / "out")


@pytest.mark.parametrize(("status", "mend"), [(401, "hf auth whoami"), (500, "later")])
def test_what_the_hub_refuses_is_one_line(adapter, hub, tmp_path, status, mend):
    hub["answer"] = answered(status)
    with pytest.raises(BadInput, match=f"the hub answered {status}.*{mend}"):
        push.push(adapter, "me/thing", tmp_path / "out")


@pytest.mark.parametrize("repo", ["thing", "me/thing/more", "me/th ing"])
def test_a_name_that_the_hub_does_not_take_is_refused_before_anything_is_sent(adapter, hub, tmp_path, repo):
    with pytest.raises(BadInput, match="owner/name"):
        push.push(adapter, repo, tmp_path / "out")
    assert "repo" not in hub


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("recipe.yaml", "# hf_abcdefghijklmnop", "credential"),
        ("metrics.json", '{"from": "s3://me:secret@place/x"}', "credential"),
        ("README.md", "trained on /home/anna/pictures/set", "path of this machine, /home/anna/pictures/set"),
        ("notes.bin", "x", "no file of an adapter directory"),
    ],
)
def test_credentials_and_places_are_refused_by_file_and_line(adapter, hub, tmp_path, name, text, reason):
    with (adapter / name).open("a") as file:
        file.write(f"\n{text}\n")
    if name != "notes.bin":
        write_checksums(adapter)
    with pytest.raises(BadInput, match=reason):
        if name == "notes.bin":
            (adapter / "checksums.json").unlink()
        push.push(adapter, "me/thing", tmp_path / "out")
    assert "repo" not in hub


WEIGHTS_DAMAGE = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "no header": lambda path: path.write_bytes(b"\xff" * 8),
    "empty": lambda path: path.write_bytes(b""),
    "not a number": lambda path: save_file({n: t * float("nan") for n, t in load_file(path).items()}, path),
}


@pytest.mark.parametrize("damage", WEIGHTS_DAMAGE)
def test_without_checksums_weights_that_nobody_could_load_are_refused(adapter, hub, tmp_path, damage, caplog):
    (adapter / CHECKSUMS).unlink()
    assert push.push(adapter, "me/thing", tmp_path / "out")
    (line,) = caplog.messages
    assert f"has no {CHECKSUMS}, so a changed number in its files would not be noticed" in line
    hub.pop("repo")
    WEIGHTS_DAMAGE[damage](adapter / WEIGHTS)
    with pytest.raises(BadInput, match=f"{WEIGHTS}: (cannot be read|.* not finite)") as refused:
        push.push(adapter, "me/thing", tmp_path / "out")
    assert "\n" not in str(refused.value) and "repo" not in hub
