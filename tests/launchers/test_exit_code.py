"""Bad input reaches the user through the real `deepspeed` launcher: one line from rank 0, exit code 2."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from mmpeft_ds.data import order
from tests.helpers import ROOT, launch
from tests.helpers.runs import tiny_vqa

pytestmark = pytest.mark.distributed


def test_exit_code_2_comes_through_the_deepspeed_launcher(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("run_dir: x\nbackbone: {name: b}\nmethod: {name: m}\noptim: {lrr: 1}\n")
    result = launch.run("launchers/train.py", "--recipe", str(recipe), ranks=2, timeout=120)
    assert not result.killed and result.code == 2, result.tail()
    lines = [line for line in result.output.splitlines() if "error: " in line]
    assert len(lines) == 1 and "optim.lrr" in lines[0] and "'lr'" in lines[0], result.tail()
    assert str(recipe) in lines[0] and 'launchers/train.py", line' not in result.output


def test_a_shard_that_only_rank_1_misses_ends_both_ranks_in_one_line(tmp_path):
    """Without the check at start a shard may go while nobody reads it; the other rank must not wait or blame gloo."""
    tiny_vqa.prepare(tmp_path)
    shards = sorted((tmp_path / "data").glob("toy-train-*.tar"))
    key = order.key_of(3, "order", 0, 0)  # seed of the toy recipe, first source, first epoch
    last = order.EpochOrder([8, 8, 8, 6], key, 1, True)[29][0]  # of the last position, so a slot of rank 1 alone
    shards[last].unlink()
    # One slot a rank: rank 1 needs that shard in its second half only.
    sets = ["data.verify=none", "data.shuffle_block=1", "optim.epochs=1", "data.global_batch=2"]
    words = [word for s in sets for word in ("--set", s)]
    result = launch.run_forked(ROOT / "launchers" / "train.py", "--recipe", str(tmp_path / "recipe.yaml"), *words)
    assert list(result.codes) == [2, 2], result.tail()
    lines = [line for line in result.output.splitlines() if "error: " in line]
    assert len(lines) == 1 and shards[last].name in lines[0], result.tail()
    assert "Traceback" not in result.output, result.tail()
    # The steps before it are not lost.
    run = Path(yaml.safe_load((tmp_path / "recipe.yaml").read_text())["run_dir"])
    done = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(done) > 3 and (run / "checkpoints" / "latest").read_text().strip() == f"step-{done[-1]:08d}"


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="DeepSpeed makes these buffers on CPU only")
def test_a_launch_leaves_no_buffer_in_shared_memory(tmp_path):
    """DeepSpeed on CPU would leave 69 MB a rank, as the second launch shows."""
    script = tmp_path / "join.py"
    script.write_text(
        "import os, sys, torch\n"
        "from mmpeft_ds.distributed import processes\n"
        "import contextlib\n"
        "if 'control' in sys.argv: processes.no_shared_buffers = contextlib.nullcontext\n"
        "processes.start(threads=1)\n"
        "torch.distributed.barrier()\n"
        "open(sys.argv[-1], 'w').write(os.environ['MASTER_PORT'])\n"
    )
    left = {}
    for mode in ("ours", "control"):
        port_file = tmp_path / mode
        result = launch.run(script, mode, str(port_file), ranks=2, timeout=120)
        assert result.code == 0, result.tail()
        port = port_file.read_text()
        left[mode] = list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"))
    for path in left["control"]:
        path.unlink()
    assert left["ours"] == [] and len(left["control"]) == 2
