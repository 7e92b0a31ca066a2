"""Bad input reaches the user through the real `deepspeed` launcher: one line from rank 0, exit code 2."""

import pytest
from distributed import launch


@pytest.mark.distributed
def test_exit_code_2_comes_through_the_deepspeed_launcher(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("run_dir: x\nbackbone: {name: b}\nmethod: {name: m}\noptim: {lrr: 1}\n")
    result = launch.run("launchers/train.py", "--recipe", str(recipe), ranks=2, timeout=120)
    assert not result.killed and result.code == 2, result.tail()
    lines = [line for line in result.output.splitlines() if "error: " in line]
    assert len(lines) == 1 and "optim.lrr" in lines[0] and "'lr'" in lines[0], result.tail()
    assert str(recipe) in lines[0] and "launchers/train.py\", line" not in result.output
