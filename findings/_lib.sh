# Shell functions that every finding sources: an environment with pinned packages, and a run of Python in it.
#
#   pins NAME==VERSION ...       makes (or reuses) an environment that holds exactly these versions; nothing else is pinned
#   no_deps NAME==VERSION ...    packages installed without what they ask for; call it before `pins`
#   observe < script             runs the script on standard input; its exit code is the finding's
#   in_ranks N < script          the same in N processes of torch.distributed (gloo, loopback), rank 0's exit code counts
#
# A script asserts what was seen: a failed assertion ends with exit code 1, "changed". An environment that cannot be
# made ends with exit code 3, "not run".
#
# FINDINGS_PYTHON=/path/to/python   is used in place of a new environment if its versions equal the pins.
# FINDINGS_CACHE=DIR                keeps environments there, one for each set of pins (`run` sets it for its own time).

set -euo pipefail

CHANGED=1 NOT_RUN=3
WORK=$(mktemp -d "${TMPDIR:-/tmp}/finding.XXXXXX")
trap 'rm -rf "$WORK"' EXIT
NO_DEPS=()
PYTHON=
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-${FINDINGS_CACHE:-$WORK}/torch_extensions}
export HF_HOME=$WORK/huggingface  # what a library writes there goes with the rest
export CUDA_VISIBLE_DEVICES='' DS_ACCELERATOR=cpu PYTHONWARNINGS=ignore PYTHONDONTWRITEBYTECODE=1
unset PYTHONPATH

no_deps() { NO_DEPS=("$@"); }

# Whether $1, a Python, holds the packages of the remaining arguments in these versions (a local part as +cpu is ignored).
holds() {
    "$1" - "${@:2}" <<'PY'
import sys
from importlib.metadata import PackageNotFoundError, version

def installed(name):
    try:
        return version(name).split("+")[0]
    except PackageNotFoundError:
        return None

wrong = [f"{pin} (installed: {installed(pin.split('==')[0])})" for pin in sys.argv[1:]
         if installed(pin.split("==")[0]) != pin.split("==")[1]]
print(*wrong, sep=", ")
sys.exit(bool(wrong))
PY
}

pins() {
    local wrong folder
    if [ -n "${FINDINGS_PYTHON:-}" ]; then
        if wrong=$(holds "$FINDINGS_PYTHON" "$@" ${NO_DEPS[@]+"${NO_DEPS[@]}"}); then
            PYTHON=$FINDINGS_PYTHON
            echo "environment: $PYTHON (FINDINGS_PYTHON), its versions equal the pins"
        else
            echo "environment: a new one, FINDINGS_PYTHON has other versions: $wrong"
        fi
    fi
    if [ -z "$PYTHON" ]; then
        folder=${FINDINGS_CACHE:-$WORK}/$(printf '%s\n' "$@" -- ${NO_DEPS[@]+"${NO_DEPS[@]}"} | sort | cksum | cut -d' ' -f1)
        [ -e "$folder/ready" ] || make_environment "$folder" "$@" >&2 || { echo "the packages could not be installed" >&2; exit $NOT_RUN; }
        PYTHON=$folder/bin/python
    fi
    export PATH=$(dirname "$PYTHON"):$PATH
    echo "versions: python $("$PYTHON" -c 'import platform; print(platform.python_version())') $* ${NO_DEPS[*]-}"
    cd "$WORK"
}

make_environment() {
    local folder=$1 torch
    local pip="$folder/bin/python -m pip install --quiet --disable-pip-version-check"
    shift
    rm -rf "$folder"
    "${BASE_PYTHON:-python3}" -m venv "$folder" || return
    # torch first and alone: a CPU wheel, where one is to be had, then satisfies whatever else asks for torch.
    torch=$(printf '%s\n' "$@" | grep '^torch==' || true)
    [ -z "$torch" ] || $pip "$torch" setuptools || return
    # One package at a time asked for, all of them in one solution.
    $pip --no-build-isolation "$@" || return
    [ ${#NO_DEPS[@]} -eq 0 ] || $pip --no-deps "${NO_DEPS[@]}" || return
    touch "$folder/ready"
}

observe() {
    cat > "$WORK/observe.py"
    judge "$PYTHON" "$WORK/observe.py" "$@"
}

# Rank and rank count stand in RANK and WORLD_SIZE; the script calls init_process_group or deepspeed's own.
in_ranks() {
    local count=$1 rank port pids=()
    cat > "$WORK/observe.py"
    port=$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    for ((rank = count - 1; rank > 0; rank--)); do
        launch "$rank" "$count" "$port" > "$WORK/rank$rank.log" 2>&1 &
        pids+=($!)
    done
    if judge launch 0 "$count" "$port"; then wait "${pids[@]}"; else kill "${pids[@]}" 2> "$WORK/kill.log" || true; exit $CHANGED; fi
}

launch() {
    RANK=$1 LOCAL_RANK=$1 WORLD_SIZE=$2 LOCAL_SIZE=$2 LOCAL_WORLD_SIZE=$2 MASTER_ADDR=127.0.0.1 MASTER_PORT=$3 \
        timeout "${FINDINGS_TIMEOUT:-300}" "$PYTHON" "$WORK/observe.py"
}

judge() {
    if "$@"; then echo "held"; else echo "CHANGED: exit code $?"; return $CHANGED; fi
}
