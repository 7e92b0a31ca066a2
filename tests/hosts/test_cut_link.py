"""A link that is cut in training ends every rank within the limit of a collective, and the same command continues.

Today that limit is half an hour (`processes._TIMEOUT`), no option changes it, and nothing is said before it is over.
The tests shorten it.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import yaml

from tests.helpers import hosts
from tests.helpers.data import tiny_features

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.alone,
    pytest.mark.skipif(bool(hosts.missing()), reason=hosts.missing() or "-"),
]
SCRIPT = "tests.helpers.rank_scripts.train_with_timeout"
LIMIT = 20  # seconds of a collective
STEPS = 100_000  # more than are done before the link is cut


@pytest.fixture
def recipe(tmp_path) -> Path:
    tiny_features.write_features(tmp_path / "toy", [tiny_features.sample(i) for i in range(24)])
    source = {"dir": str(tmp_path / "toy"), "task": {"name": "classification", "text": "captions"}}
    content = {
        "run_dir": str(tmp_path / "run"),
        "backbone": {"name": "features"},
        "method": {"name": "ga_net", "r": 4, "tau": 0.2},
        "data": {"sources": [source], "validation": [source], "global_batch": 12, "workers": 0},
        "optim": {"lr": 0.01, "max_steps": STEPS},
        "engine": {"deepspeed": "ds_configs/zero3_nodes.json", "threads": 1, "save_every": 5, "eval_every": STEPS},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "recipe.yaml"


def steps_of(run: Path) -> list[int]:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("}")]


def reach(run: Path, step: int, processes: list, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while max(steps_of(run), default=0) < step:
        assert time.monotonic() < end and all(process.poll() is None for process in processes)
        time.sleep(0.1)


def test_a_cut_link_ends_both_hosts_and_the_same_command_continues_when_it_is_mended(recipe):
    run = recipe.parent / "run"
    with hosts.Hosts(2) as two:
        command = hosts.launchers(two, [1, 1], ["-m", SCRIPT, str(LIMIT), "--recipe", str(recipe)])["srun"]
        started = [two.start(host, *words, env=env) for host, words, env in command]
        reach(run, 12, started)
        two.cut(two[1])
        ended = two.wait(started, LIMIT + 120)
        assert not ended.killed and list(ended.codes) == [1, 1], ended.tail()
        for rank in range(2):
            assert f"rank {rank}: lost its connection to another rank" in ended.output, ended.tail()
        assert "Traceback" not in ended.output, ended.tail()
        last = max(steps_of(run))
        two.heal(two[1])
        again = [two.start(host, *words, env=env) for host, words, env in command]
        reach(run, last + 5, again)
        output = two.output()
    assert "RUN: continues after step" in output.replace(str(run), "RUN")
    steps = steps_of(run)
    assert steps == list(range(1, len(steps) + 1)), "no step is lost or done twice"
