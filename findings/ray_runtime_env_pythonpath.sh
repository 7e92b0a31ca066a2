#!/usr/bin/env bash
# ray: PYTHONPATH in runtime_env replaces the driver's for its tasks.
#
# A good guess: tasks inherit the driver's PYTHONPATH (they do, without runtime_env), and env_vars adds to it, as working_dir
#   and py_modules do, which put themselves in front.
# What happens: env_vars {"PYTHONPATH": ...}, in ray.init or for one task, is all that the task gets; what the driver could
#   import, the task cannot. (PATH and LD_LIBRARY_PATH can be extended by writing ${PATH} in the value; so can this one.)
# Source: ray._private.runtime_env, the env_vars of a RuntimeEnvContext, set last.
# Who is hurt: repositories that run from a checkout (PYTHONPATH=.) and add one folder for their workers.
. "$(dirname "$0")/_lib.sh"
pins ray==2.60.0

mkdir driver_modules other
echo "HERE = True" > driver_modules/only_of_the_driver.py
export RAY_ENABLE_UV_RUN_RUNTIME_ENV=0
PYTHONPATH=$PWD/driver_modules observe <<'PY'
import os
import only_of_the_driver, ray

def importable():
    try:
        import only_of_the_driver
        return True
    except ImportError:
        return False

ray.init(num_cpus=1, include_dashboard=False, logging_level="ERROR", object_store_memory=80 * 2**20)
other = os.path.abspath("other")
seen = {}
for name, env in (("none", None), ("PYTHONPATH: other", {"env_vars": {"PYTHONPATH": other}}),
                  ("PYTHONPATH: other:${PYTHONPATH}", {"env_vars": {"PYTHONPATH": other + ":${PYTHONPATH}"}})):
    seen[name] = ray.get(ray.remote(importable).options(runtime_env=env).remote())
    print(f"runtime_env {name}: the driver's module can be imported in a task: {seen[name]}")
ray.shutdown()
assert list(seen.values()) == [True, False, True], seen
PY
