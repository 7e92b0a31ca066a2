#!/usr/bin/env bash
# DeepSpeed: `deepspeed --hostfile` passes hardly any environment variable on to the other nodes.
#
# A good guess: variables set in front of the command reach all ranks, as they do on one node.
# What happens: only names that begin with PYTHON, MV2, UCX or MLFLOW are exported, on CUDA also NCCL. HF_*, GLOO_*, TORCH_*,
#   OMP_NUM_THREADS and LD_LIBRARY_PATH are not. What must arrive has to stand in a file .deepspeed_env.
# Source: deepspeed.launcher.runner.EXPORT_ENVS, the accelerator's export_envs, and DEEPSPEED_ENVIRONMENT_NAME.
# Who is hurt: several nodes without a shared shell profile: another network interface, another cache, downloads on nodes
#   that were told to stay offline, one thread here and 64 there.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 deepspeed==0.19.8

# Stand-ins for pdsh and ssh on the path: they print what they would run, and no other machine is spoken to.
mkdir stand-ins
printf '#!/bin/sh\necho "$@"\n' > stand-ins/pdsh
printf '#!/bin/sh\necho 127.0.0.1\n' > stand-ins/ssh
chmod +x stand-ins/*
printf 'node1 slots=1\nnode2 slots=1\n' > hostfile
PATH=$PWD/stand-ins:$PATH HOME=$PWD GLOO_SOCKET_IFNAME=eth0 HF_HOME=/data/hf TORCH_NCCL_BLOCKING_WAIT=1 OMP_NUM_THREADS=4 \
    PYTHONHASHSEED=0 deepspeed --hostfile hostfile --master_addr 127.0.0.1 train.py > command.log 2>&1
exported=$(grep -o 'export [A-Z0-9_]*' command.log | cut -d' ' -f2 | sort -u | tr '\n' ' ')
echo "set: GLOO_SOCKET_IFNAME HF_HOME TORCH_NCCL_BLOCKING_WAIT OMP_NUM_THREADS PYTHONHASHSEED"
echo "exported to the nodes: $exported"
judge eval '[[ "$exported" == *PYTHONHASHSEED* && ! "$exported" =~ GLOO|HF_|TORCH|OMP ]]'
