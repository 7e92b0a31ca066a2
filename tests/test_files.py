"""Files are complete or absent, and others may read them as the umask says."""

import errno
import os
import signal
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmpeft_ds import console, files
from mmpeft_ds.distributed import collectives
from mmpeft_ds.errors import BadInput
from tests.helpers.forked_ranks import in_ranks


@pytest.fixture(params=[0o022, 0o077], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(folder: Path) -> set[int]:
    return {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()}


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "f"
    files.write_atomic(path, b"old")

    def no_rename(*a):
        raise OSError("power cut")

    monkeypatch.setattr("mmpeft_ds.files.os.replace", no_rename)
    with pytest.raises(OSError, match="power cut"):
        files.write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_directory_has_its_name_only_when_it_is_complete(tmp_path):
    with pytest.raises(ZeroDivisionError), files.new_directory(tmp_path / "d") as partial:
        (partial / "f").write_text("half")
        assert not (tmp_path / "d").exists()
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    with files.new_directory(tmp_path / "d") as partial:
        (partial / "f").write_text("whole")
    assert (tmp_path / "d" / "f").read_text() == "whole" and list(tmp_path.iterdir()) == [tmp_path / "d"]


def test_a_directory_makes_way_for_a_new_one_only_where_that_is_asked(tmp_path):
    for text in ("first", "second"):
        with files.new_directory(tmp_path / "d", replace=True) as partial:
            (partial / text).write_text(text)
    assert [p.name for p in (tmp_path / "d").iterdir()] == ["second"] and list(tmp_path.iterdir()) == [tmp_path / "d"]
    with pytest.raises(OSError, match="d"), files.new_directory(tmp_path / "d"):
        pass
    assert [p.name for p in (tmp_path / "d").iterdir()] == ["second"]


@pytest.mark.parametrize("exchange", [True, False], ids=["names are exchanged", "not offered, as on NFS"])
@pytest.mark.parametrize("renames", [0, 1])
def test_a_writer_killed_at_a_rename_leaves_the_old_directory(tmp_path, monkeypatch, exchange, renames):
    """`renames`: how many happen before. In the test, the child is killed; the parent is whoever comes next."""
    with files.new_directory(tmp_path / "d") as partial:
        (partial / "f").write_text("first")
    if not exchange:
        monkeypatch.setattr(files, "_exchanged", lambda one, other: False)
    child = os.fork()
    if child == 0:
        before, rename = iter(range(renames)), Path.rename
        monkeypatch.setattr(
            Path, "rename", lambda *a: rename(*a) if next(before, None) is not None else os.kill(os.getpid(), 9)
        )
        with files.new_directory(tmp_path / "d", replace=True) as partial:
            (partial / "f").write_text("second")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == (0 if exchange else signal.SIGKILL)
    assert (tmp_path / "d").exists() == (exchange or renames == 0)
    with pytest.raises(ZeroDivisionError), files.new_directory(tmp_path / "d", replace=True) as partial:
        raise ZeroDivisionError
    assert (tmp_path / "d" / "f").read_text() == ("second" if exchange else "first")
    with files.new_directory(tmp_path / "d", replace=True) as partial:
        (partial / "f").write_text("third")
    assert (tmp_path / "d" / "f").read_text() == "third" and list(tmp_path.iterdir()) == [tmp_path / "d"]


@pytest.mark.parametrize("exchange", [True, False])
def test_a_link_to_a_directory_makes_way_too_and_what_it_leads_to_stays(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(files, "_exchanged", lambda one, other: False)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "d").symlink_to(tmp_path / "elsewhere")
    for words in ("second", "third"):
        with files.new_directory(tmp_path / "d", replace=True) as partial:
            (partial / "f").write_text(words)
        assert (tmp_path / "d" / "f").read_text() == words and not (tmp_path / "d").is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d", "elsewhere"]


def test_tensors_follow_the_umask_which_safetensors_does_not(tmp_path, umask):
    tensors = {"w": torch.arange(3.0)}
    save_file(tensors, tmp_path / "plain.safetensors")
    assert modes(tmp_path) == {0o600}
    (tmp_path / "plain.safetensors").unlink()
    files.save_tensors(tmp_path / "ours.safetensors", tensors, {"made": "here"})
    files.write_json(tmp_path / "neighbour.json", {})
    assert modes(tmp_path) == {0o666 & ~umask}
    assert load_file(tmp_path / "ours.safetensors")["w"].equal(tensors["w"])


def test_what_others_wrote_into_a_new_directory_follows_the_umask(tmp_path, umask):
    with files.new_directory(tmp_path / "d") as partial:
        (partial / "inner").mkdir()
        save_file({"w": torch.zeros(2)}, partial / "inner" / "model.safetensors")
        (partial / "config.json").write_text("{}")
    assert modes(tmp_path / "d") == {0o666 & ~umask}
    assert stat.S_IMODE((tmp_path / "d").stat().st_mode) == 0o777 & ~umask


def test_sha256_of_a_file_and_of_an_open_one_are_equal(tmp_path):
    (tmp_path / "f").write_bytes(b"x" * 3_000_000)
    with (tmp_path / "f").open("rb") as stream:
        assert files.sha256(stream) == files.sha256(tmp_path / "f")
    assert files.sha256(tmp_path / "f") != files.sha256(Path(__file__))


def test_the_sha256_of_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(OSError, match="is a pipe or a device"):
            files.sha256(path)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENAMETOOLONG])
def test_a_command_that_cannot_write_says_so_in_one_line(capsys, code):
    def main():
        raise OSError(code, os.strerror(code), "runs/x/file")

    with pytest.raises(SystemExit) as left:
        console.run(main)
    assert left.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: runs/x/file: cannot be written ({os.strerror(code)})") and err.count("\n") == 1


def test_another_error_of_the_system_keeps_its_traceback():
    def main():
        raise ConnectionResetError(errno.ECONNRESET, "reset")

    with pytest.raises(ConnectionResetError):
        console.run(main)


def test_a_directory_that_cannot_be_written_into_is_found_out_before_the_work(tmp_path):
    files.check_writable(tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"file: cannot be written \(Not a directory\)"):
        files.check_writable(tmp_path / "file")


def test_a_full_disk_is_named_with_the_file_and_a_remedy(tmp_path):
    """write() itself names no file; safetensors raises no OSError at all."""
    with pytest.raises(OSError, match="No space left") as raised, files.naming(tmp_path / "f"):
        with open("/dev/full", "w") as file:
            file.write("x")
    assert raised.value.filename == str(tmp_path / "f")
    assert files.cannot_write(raised.value).startswith("cannot be written (No space left on device). Make room")
    with pytest.raises(OSError, match="No space left") as raised, files.naming(tmp_path / "d"):
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    assert raised.value.filename == str(tmp_path / "d") and files.cannot_write(raised.value)
    with pytest.raises(ValueError, match="os error 28"), files.naming(tmp_path / "d"):
        raise ValueError("os error 28")


def test_a_full_disk_on_rank_0_ends_all_ranks_in_the_same_line():
    def fill() -> None:
        with files.naming(Path("checkpoint")), open("/dev/full", "w") as file:
            file.write("x")

    def on_rank(rank: int) -> str:
        try:
            collectives.on_rank0(fill)
        except BadInput as error:
            return str(error)

    lines = in_ranks(on_rank)
    assert lines[0] == lines[1] and lines[0].startswith("checkpoint: cannot be written (No space left on device).")
