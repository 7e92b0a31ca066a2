#!/usr/bin/env bash
# DeepSpeed: SIGTERM to the deepspeed command ends that command and leaves the ranks running.
#
# A good guess: the launcher passes SIGTERM on and waits, as torchrun does, so that `kill PID` or a job system's stop ends
#   the training.
# What happens: the command exits with 143 at once; its child (deepspeed.launcher.launch) and every rank go on as orphans,
#   keep their GPUs, and may write into a run directory that the next start uses too.
# Source: deepspeed.launcher.runner.main installs signal handlers for several nodes over pdsh only; deepspeed.launcher.launch
#   would pass SIGTERM on, but gets none.
# Who is hurt: job systems, containers and supervisors that signal the process they started and not its group.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 deepspeed==0.19.8

cat > train.py <<'PY'
import os, pathlib, time
pathlib.Path(f"pid.{os.environ['RANK']}").write_text(str(os.getpid()))
time.sleep(90)
PY
deepspeed --num_accelerators 2 --master_port 0 train.py > launcher.log 2>&1 &
launcher=$!
for _ in $(seq 90); do [ -s pid.0 ] && [ -s pid.1 ] && break; sleep 1; done
kill -TERM $launcher
code=0; wait $launcher || code=$?
sleep 5
alive=0
for rank in 0 1; do
    if kill -0 "$(cat pid.$rank)"; then alive=$((alive + 1)); kill -KILL "$(cat pid.$rank)"; fi
done
echo "exit code of deepspeed after SIGTERM: $code; ranks still running 5 s later: $alive of 2"
judge test "$code $alive" = "143 2"
