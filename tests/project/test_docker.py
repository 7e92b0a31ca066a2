"""What the image and its compose files give a container, read as an operator reads them; nothing is built here."""

from __future__ import annotations

import fnmatch
import os
import re
import runpy
import subprocess

import pytest
import yaml

from mmpeft_ds.recipe.options import EngineOptions
from tests.helpers import ROOT

DOCKER = ROOT / "docker"
PACKAGES = {
    "InfiniBand": {"libibverbs1", "ibverbs-providers", "rdma-core", "librdmacm1t64"},
    "deepspeed's launcher": {"openssh-client", "openssh-server", "pdsh"},
    "compiled operators": {"g++", "libaio-dev", "make", "python3-dev"},
}


def texts() -> dict[str, str]:
    return {
        name: (DOCKER / name).read_text() for name in ("Dockerfile", "compose.yaml", "infiniband.yaml", "serve.sh")
    }


def instructions(dockerfile: str) -> list[str]:
    """The instructions of a Dockerfile in order, each in one line, without comments."""
    lines = [line for line in dockerfile.splitlines() if not line.lstrip().startswith("#")]
    return [" ".join(line.split()) for line in "\n".join(lines).replace("\\\n", " ").splitlines() if line.strip()]


def lacking(given: dict[str, str]) -> list[str]:
    """What a node of a GPU cluster would miss."""
    steps = instructions(given["Dockerfile"])
    installed = {word for step in steps if "apt-get install" in step for word in step.split()}
    missing = [name for purpose in PACKAGES.values() for name in sorted(purpose - installed)]
    missing += [name for name in ("580", "7.5", "8.0") if name not in given["Dockerfile"]]
    for_cuda = {"ARG DEVICE=cuda", "ENV DEVICE=${DEVICE}", "RUN make setup"} <= set(steps)
    missing += [] if for_cuda else ["setup for CUDA"]
    services = yaml.safe_load(given["compose.yaml"])["services"]
    fabric = yaml.safe_load(given["infiniband.yaml"])["services"]
    for name in ("train", "node"):
        service, more = services[name], fabric[name]
        locks = service["ulimits"]["memlock"] == -1 and service["network_mode"] == "host" and service["shm_size"]
        missing += [] if locks else [f"{name}: memory or network"]
        mounts = [mount.rsplit(":", 1)[-1] for mount in service["volumes"]]
        missing += [] if service["environment"]["HF_HOME"] in mounts else [f"{name}: cache of the hub"]
        devices = service["deploy"]["resources"]["reservations"]["devices"]
        missing += [] if [d["driver"] for d in devices] == ["nvidia"] and devices[0]["count"] == "all" else ["GPUs"]
        has_fabric = more.get("devices") == ["/dev/infiniband:/dev/infiniband"] and "IPC_LOCK" in more.get(
            "cap_add", []
        )
        missing += [] if has_fabric else [f"{name}: InfiniBand"]
    return missing


def test_a_container_has_what_a_node_of_a_gpu_cluster_needs():
    assert lacking(texts()) == []


def test_the_compiler_of_the_image_is_that_of_the_pinned_torch():
    """DeepSpeed refuses to compile operators with an nvcc of another version than torch was built with."""
    image = re.search(r"^ARG CUDA=(\d+\.\d+)", texts()["Dockerfile"], re.M).group(1)
    pins = (ROOT / "constraints" / "cuda.txt").read_text()
    assert re.search(r"^cuda-toolkit==(\d+\.\d+)", pins, re.M).group(1) == image


@pytest.mark.parametrize(
    "file, here, missing",
    [
        ("Dockerfile", "libibverbs1 ", "libibverbs1"),
        ("Dockerfile", "openssh-server ", "openssh-server"),
        ("Dockerfile", "580", "580"),
        ("Dockerfile", "ENV DEVICE=${DEVICE}", "setup for CUDA"),
        ("compose.yaml", "memlock: -1", "train: memory or network"),
        ("compose.yaml", "  - ${HF_HOME:-~/.cache/huggingface}:/opt/huggingface\n", "node: cache of the hub"),
        ("infiniband.yaml", "IPC_LOCK", "node: InfiniBand"),
    ],
)
def test_the_check_sees_what_is_taken_away(file, here, missing):
    given = texts()
    assert here in given[file]
    given[file] = given[file].replace(here, "memlock: 65536" if "memlock" in here else "")
    assert missing in lacking(given)


def test_the_ssh_server_has_a_port_of_its_own_and_no_host_key_comes_with_the_image():
    given = texts()
    node = yaml.safe_load(given["compose.yaml"])["services"]["node"]
    assert node["command"] == "docker/serve.sh" and node["environment"]["SSH_PORT"] == "${SSH_PORT:-2222}"
    assert "/etc/ssh/ssh_host_*" in given["Dockerfile"], "else everybody who has the image has its keys"
    assert (DOCKER / "serve.sh").stat().st_mode & 0o111
    subprocess.run(["bash", "-n", DOCKER / "serve.sh"], check=True)
    refused = subprocess.run(["bash", DOCKER / "serve.sh"], capture_output=True, text=True)
    assert refused.returncode == 2 and "no /opt/keys/id_ed25519.pub. Make a key" in refused.stderr


def reinstalled_for(steps: list[str]) -> list[str]:
    """What is copied before the packages are installed: a change of it installs them again."""
    last = next(i for i, step in enumerate(steps) if "make packages" in step)
    return [word for step in steps[:last] if step.startswith("COPY ") for word in step.split()[1:-1]]


def test_a_change_of_the_code_does_not_install_the_packages_again():
    steps = instructions(texts()["Dockerfile"])
    assert reinstalled_for(steps) == ["pyproject.toml", "Makefile", "constraints"]
    moved = [step for step in steps if step == "COPY mmpeft_ds mmpeft_ds"] + steps
    assert "mmpeft_ds" in reinstalled_for(moved)
    assert "mmpeft_ds.backbones" not in make("packages", "DEVICE=cpu"), "there is no code yet"
    assert "mmpeft_ds.backbones" in make("setup", "DEVICE=cpu")
    installing = [step for step in steps if "make packages" in step or "make flash-attn" in step]
    assert len(installing) == 2 and all("--mount=type=cache,target=/root/.cache/pip" in step for step in installing)


def test_files_younger_than_the_packages_do_not_install_them_again(tmp_path):
    """Checked out again, files are younger than the layers that the builder has kept."""
    steps = instructions(texts()["Dockerfile"])
    assert steps.index("COPY . .") < steps.index("RUN make --touch setup")
    for name in ("Makefile", "pyproject.toml", "constraints/cpu.txt", ".venv/packages-cpu", ".venv/ready-cpu"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes() if "venv" not in name else b"")
    os.utime(tmp_path / ".venv/ready-cpu", (1, 1))
    os.utime(tmp_path / ".venv/packages-cpu", (1, 1))
    plan = ["make", "--dry-run", "setup", "DEVICE=cpu"]
    assert "pip" in subprocess.run(plan, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    subprocess.run(["make", "--touch", "setup", "DEVICE=cpu"], cwd=tmp_path, capture_output=True, check=True)
    assert "pip" not in subprocess.run(plan, cwd=tmp_path, capture_output=True, text=True, check=True).stdout


def left_out(path: str, patterns: list[str]) -> bool:
    """Whether a .dockerignore leaves this path out, as Docker reads one: from the root, a folder with all below it."""
    parts = path.split("/")
    heads = ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]
    return any(
        any(fnmatch.fnmatchcase(h.rsplit("/", 1)[-1], p[3:]) for h in heads)
        if p.startswith("**/")
        else any(h.count("/") == p.count("/") and fnmatch.fnmatchcase(h, p) for h in heads)
        for p in patterns
    )


def test_the_image_takes_up_what_git_has_and_leaves_out_what_it_ignores():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    for line in (ROOT / ".gitignore").read_text().split():
        made = line.strip("/").replace("*", "x")
        assert left_out(f"{made}/file", patterns), f".gitignore has {line}, .dockerignore does not"
    assert left_out("tests/data/__pycache__/x.pyc", patterns)
    assert left_out("docker/.env", patterns), "compose reads variables there, HF_TOKEN among them"
    needed = ["mmpeft_ds/data/stream.py", "mmpeft_ds/models/base.py", "docker/serve.sh", "tests/data/test_stream.py"]
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert [path for path in needed + tracked if left_out(path, patterns)] == []


def test_a_stopped_container_has_time_to_save():
    services = yaml.safe_load(texts()["compose.yaml"])["services"]
    grace = runpy.run_path(str(DOCKER / "init.py"))["GRACE"]
    for name in ("train", "node"):
        assert services[name]["stop_grace_period"] == f"{grace}s"
    assert grace >= EngineOptions().stop_grace + 10


def make(target: str, *variables: str) -> str:
    """The commands that make would run."""
    command = ["make", "--dry-run", "--always-make", target, *variables]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_the_operator_of_the_cpu_is_compiled_for_a_cpu_machine_alone():
    """No GPU is seen while an image is built, so DeepSpeed would take that for a CPU machine."""
    assert "ShareMemCommBuilder" in make("setup", "DEVICE=cpu")
    assert "ShareMemCommBuilder" not in make("setup", "DEVICE=cuda")


def test_flash_attn_is_built_against_the_pinned_torch_and_for_cuda_alone():
    (line,) = [line for line in make("flash-attn", "DEVICE=cuda").splitlines() if line.endswith("flash-attn")]
    assert "--constraint constraints/cuda.txt" in line and "--no-build-isolation" in line
    command = ["make", "--silent", "--old-file=.venv/packages-cpu", "flash-attn", "DEVICE=cpu"]
    environment = {name: value for name, value in os.environ.items() if name != "MAKEFLAGS"}  # of `make -i test`
    refused = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert refused.returncode and "flash-attn runs on GPUs alone" in refused.stderr
    assert not re.search(r"^gpu\s*=|flash", (ROOT / "pyproject.toml").read_text(), re.M), "an extra cannot install it"
