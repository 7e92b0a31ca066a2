#!/usr/bin/env bash
# ray: what .gitignore names is missing in the working_dir of the tasks.
#
# A good guess: runtime_env={"working_dir": "."} sends the folder; files that the driver opens by a relative path are there.
# What happens: .gitignore is honoured, and data, weights and generated files are what it names. Tasks start, and fail with
#   "no such file", or fall back to something else. RAY_RUNTIME_ENV_IGNORE_GITIGNORE=1 sends them.
# Source: ray._private.runtime_env.packaging (get_excludes_from_ignore_files and its environment variable).
# Who is hurt: data preparation and training from a checkout whose data/ and *.safetensors are ignored by git.
. "$(dirname "$0")/_lib.sh"
pins ray==2.60.0

mkdir -p project/data
touch project/code.py project/data/list.json project/adapter.safetensors
printf 'data/\n*.safetensors\n' > project/.gitignore
cat > look.py <<'PY'
import os, sys
import ray

def files():
    return sorted(os.path.relpath(os.path.join(folder, name)) for folder, _, names in os.walk(".") for name in names)

ray.init(num_cpus=1, include_dashboard=False, logging_level="ERROR", object_store_memory=80 * 2**20,
         runtime_env={"working_dir": sys.argv[1]})
print(*ray.get(ray.remote(files).remote()))
ray.shutdown()
PY
there=$(cd project && find . -type f | cut -c3- | sort | tr '\n' ' ')
sent=$("$PYTHON" look.py project 2> ray.log | tail -n 1)
all=$(RAY_RUNTIME_ENV_IGNORE_GITIGNORE=1 "$PYTHON" look.py project 2> ray.log | tail -n 1)
echo "files of the folder:                             $there"
echo "files that a task sees:                          $sent"
echo "with RAY_RUNTIME_ENV_IGNORE_GITIGNORE=1:         $all"
judge test "$sent" = ".gitignore code.py" -a "$all" = ".gitignore adapter.safetensors code.py data/list.json"
