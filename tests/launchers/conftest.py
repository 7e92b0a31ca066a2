"""Fixtures of the commands' tests: a launcher in this process, tiny adapters of every task, a folder of pictures."""

import io
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers import ROOT, commands
from tests.helpers.data.images import encoded
from tests.helpers.runs import tiny_adapters


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Adapter directory of a kind, made at first use."""
    made = {}

    def of(kind: str) -> Path:
        if kind not in made:
            made[kind] = tiny_adapters.export(tmp_path_factory.mktemp(kind.replace(" ", "-")), kind)
        return made[kind]

    return of


@pytest.fixture
def photos(tmp_path):
    """A folder with three pictures, one of them a PNG."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(2):
        (folder / f"photo{i}.jpg").write_bytes(encoded(50 + i))
    Image.open(io.BytesIO(encoded(60))).save(folder / "photo2.png")
    return folder


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a launcher in this process: (exit code, stdout, stderr)."""

    def run(script, *args):
        capsys.readouterr()
        code = commands.run_script(ROOT / "launchers" / script, list(map(str, args)), monkeypatch)
        assert sys.path[0] == str(ROOT)  # under test: the launcher's own folder is replaced by the repository
        out, err = capsys.readouterr()
        return code, out, err

    return run
