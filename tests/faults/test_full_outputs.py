"""Every command that writes, where it cannot: one line of rank 0, exit code 2 of every rank, nothing half-written, and
the same command ends as one that was never disturbed."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.helpers import ROOT, launch, rank_server
from tests.helpers.data.images import encoded
from tests.helpers.data.tiny_pictures import pictured, write_pixels, write_towers
from tests.helpers.models import tiny_blip
from tests.helpers.runs import tiny_study, tiny_vqa
from tests.helpers.small_disk import fill, mounted

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
LIMITED = "tests.helpers.rank_scripts.limited"


@dataclass
class Command:
    """A launcher, what it is given, and the option that says where it writes, to which `name` is joined."""

    launcher: str
    words: list[str]
    option: str
    name: str = "out"
    ranks: int = 2

    def run(self, place: Path, largest: int = 0) -> launch.Result:
        out = [self.option, f"{'run_dir=' if self.option == '--set' else ''}{place / self.name}"]
        script, env = str(ROOT / "launchers" / self.launcher), {"LARGEST_FILE": str(largest)}
        words = [script, *self.words, *out]
        if largest:
            return launch.run_forked(LIMITED, *words, ranks=self.ranks, env=env)
        return launch.run_forked(*words, ranks=self.ranks)


@pytest.fixture
def small(tmp_path) -> Iterator[Path]:
    with mounted(tmp_path / "small") as place:
        yield place


@pytest.fixture(scope="module")
def commands(tmp_path_factory) -> dict[str, Command]:
    path = tmp_path_factory.mktemp("outputs")
    towers = write_towers(path)
    write_pixels(path / "pixels", {"train": [pictured(i) for i in range(23)]})
    backbone = [f"--set={key}={towers[key]}" for key in ("vision", "text", "image_size", "max_text_length")]
    tiny_blip.write(path / "blip", "captioner")
    tiny_vqa.prepare(path)
    trained = launch.run_forked(
        str(ROOT / "launchers" / "train.py"), "--recipe", str(path / "recipe.yaml"), "--set", f"run_dir={path / 'run'}"
    )
    assert trained.code == 0, trained.tail()
    (path / "pictures").mkdir()
    for i in range(12):
        (path / "pictures" / f"{i}.png").write_bytes(encoded(i, "PNG"))
    study = tiny_study.recipe(path)
    study["methods"] = study["methods"][1:]
    study["few_shot"] |= {"shots": [1], "seeds": [1, 2]}
    study["monitor"] = {"tensorboard": True}
    tiny_study.write(path / "study.yaml", study)
    data = ["--data", str(path / "pixels"), "--batch", "6"]
    blip = ["--backbone", "blip", "--set", f"model={path / 'blip'}", "--max-new-tokens", "6", "--replace"]
    asked = ["--images", str(path / "pictures"), "--text", "what is it", "--batch", "2"]
    return {
        "features": Command("features.py", [*data, "--backbone", towers["name"], *backbone], "--out"),
        "describe": Command("describe.py", [*data, *blip], "--out"),
        "few_shot": Command("few_shot.py", ["--recipe", str(path / "study.yaml")], "--set"),
        "fisher": Command("fisher.py", ["--run", str(path / "run")], "--out", "out.safetensors"),
        "predict": Command(
            "predict.py", ["--adapter", str(path / "run" / "adapter"), *asked], "--out", "out.jsonl", ranks=0
        ),
    }


class Untouched(dict):
    """Command -> what it writes where nothing is in its way."""

    def __init__(self, commands: dict[str, Command], factory: pytest.TempPathFactory):
        self.commands, self.factory = commands, factory

    def __missing__(self, name: str) -> dict[str, bytes]:
        place = self.factory.mktemp(name)
        done = self.commands[name].run(place)
        assert done.code == 0, done.tail()
        self[name] = contents(place)
        return self[name]


@pytest.fixture(scope="module")
def untouched(commands, tmp_path_factory) -> Untouched:
    return Untouched(commands, tmp_path_factory)


def contents(place: Path) -> dict[str, bytes]:
    """What must be equal bit for bit: of a study the trained weights, since its tables hold seconds."""
    kept = {path.relative_to(place).as_posix(): path for path in place.rglob("*") if path.is_file()}
    study = any("adapter/" in name for name in kept)
    names = [name for name in kept if name.endswith("adapter_model.safetensors") or not study]
    return {name: kept[name].read_bytes() for name in names if "ballast" not in name}


def size_of(written: dict[str, bytes]) -> int:
    return sum(map(len, written.values()))


def refused(done: launch.Result, place: Path, *reasons: str) -> None:
    print("\n".join(line for line in done.output.splitlines() if "error" in line))
    # The tables of a study are written by rank 0 when the work of the others is done.
    others = {0} if "of 2 runs are done" in done.output or "results." in done.output else set()
    assert {2} <= set(done.codes) <= {2} | others and "Traceback" not in done.output, done.tail()
    (line,) = [line for line in done.output.splitlines() if line.startswith("error:")]
    assert any(reason in line for reason in reasons) and str(place) in line, line
    half = [p for p in place.rglob("*") if "partial" in p.name or p.name.endswith(".tmp")]
    assert not half, "nothing half-written is left"


COMMANDS = ("features", "describe", "few_shot", "fisher", "predict")


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("share", [0.05, 0.6, 0.95])
def test_a_command_without_room_ends_in_a_line_and_goes_on(commands, untouched, small, name, share):
    room = {"few_shot": 1.6e5, "predict": size_of(untouched[name])}.get(name, size_of(untouched[name]) + 8192)
    ballast = fill(small, int(share * room) // 4096 * 4096)
    done = commands[name].run(small)
    if done.code == 0:  # the last page had room
        assert share > 0.5 and contents(small).keys() >= untouched[name].keys()
        return
    refused(done, small, "No space left on device")
    ballast.unlink()
    done = commands[name].run(small)
    assert done.code == 0, done.tail()
    assert contents(small) == untouched[name]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_whose_files_may_not_grow_ends_in_a_line_and_goes_on(commands, untouched, tmp_path, name):
    largest = max(len(content) for content in untouched[name].values())
    room = {"few_shot": 3000}.get(name, largest // 2)  # what ranks print goes to a file as well
    refused(commands[name].run(tmp_path, largest=room), tmp_path, "File too large")
    done = commands[name].run(tmp_path)
    assert done.code == 0, done.tail()
    assert contents(tmp_path) == untouched[name]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_on_a_file_system_that_cannot_be_written_ends_in_a_line(commands, untouched, small, name):
    subprocess.run(["mount", "-o", "remount,ro", small], check=True)
    refused(commands[name].run(small), small, "Read-only file system", "cannot be written", "cannot be made")
    subprocess.run(["mount", "-o", "remount,rw", small], check=True)
    done = commands[name].run(small)
    assert done.code == 0, done.tail()
    assert contents(small) == untouched[name]


@pytest.mark.parametrize("name", ["features", "describe"])
def test_a_command_whose_directory_is_removed_ends_in_a_line_and_begins_anew(commands, untouched, tmp_path, name):
    removed = threading.Event()

    def remove() -> None:
        end = time.monotonic() + 300
        while time.monotonic() < end and not list((tmp_path / "out").glob("*.tar")):
            time.sleep(0.001)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        removed.set()

    beside = threading.Thread(target=remove)
    beside.start()
    done = commands[name].run(tmp_path)
    beside.join()
    assert removed.is_set()
    refused(done, tmp_path, "its directory is gone", "is not there")
    done = commands[name].run(tmp_path)
    assert done.code == 0, done.tail()
    assert contents(tmp_path) == untouched[name]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize("moment", ["set-up", "work"])
@pytest.mark.parametrize("name", ["features", "describe", "few_shot", "fisher"])
def test_a_command_that_gets_a_signal_stops_and_goes_on(commands, untouched, tmp_path, name, moment, number):
    """As `scancel --signal` sends it, to every rank."""
    pattern = {"few_shot": "out/*/*/metrics.jsonl", "fisher": "*"}.get(name, "out/*.tar")
    ended = threading.Event()

    def send() -> None:
        while len(ranks := rank_server.ranks()) < 2 and not ended.is_set():
            time.sleep(0.001)
        if moment == "set-up" or name == "fisher":
            ended.wait(1.0 if moment == "set-up" else 4.0)
        while moment == "work" and name != "fisher" and not list(tmp_path.glob(pattern)) and not ended.is_set():
            time.sleep(0.001)
        for rank in ranks:
            with contextlib.suppress(psutil.Error):
                rank.send_signal(number)

    untouched[name]  # noqa: B018 - made before
    beside = threading.Thread(target=send)
    beside.start()
    done = commands[name].run(tmp_path)
    ended.set()
    beside.join()
    print(name, moment, number.name, done.codes, [line for line in done.output.splitlines() if "stopped" in line])
    assert not done.killed and "Traceback" not in done.output, done.tail()
    # In set-up before Python has begun to listen the kernel ends it; at the very end there is nothing left to stop.
    assert set(done.codes) <= {0, 1, 128 + number, -number}, done.tail()
    assert not [p for p in tmp_path.rglob("*") if "partial" in p.name or p.name.endswith(".tmp")]
    done = commands[name].run(tmp_path)
    assert done.code == 0, done.tail()
    assert contents(tmp_path) == untouched[name]
