#!/bin/bash
# Ssh server of a container, by which `deepspeed --hostfile` of another node starts ranks here.
# /opt/keys holds id_ed25519 and id_ed25519.pub, the same on all nodes: whoever has the key may enter.
set -euo pipefail
port=${SSH_PORT:-2222}
[ -r /opt/keys/id_ed25519.pub ] || {
  echo "docker/serve.sh: no /opt/keys/id_ed25519.pub. Make a key (ssh-keygen -t ed25519 -N '' -f keys/id_ed25519) and mount it." >&2
  exit 2
}
install -d -m 700 ~/.ssh /run/sshd
install -m 600 /opt/keys/id_ed25519 ~/.ssh/id_ed25519
install -m 600 /opt/keys/id_ed25519.pub ~/.ssh/authorized_keys
# The ranks' own environment, which a login by ssh does not inherit.
printf 'Host *\n  Port %s\n  StrictHostKeyChecking accept-new\n' "$port" > ~/.ssh/config
env | grep -E '^(PATH|LD_LIBRARY_PATH|NVIDIA_|CUDA|NCCL_|GLOO_|HF_|TRITON_|TORCH_|DS_|OMP_|MMPEFT_)' > ~/.ssh/environment || true
ssh-keygen -A
[ $# -gt 0 ] && { /usr/sbin/sshd -p "$port" -o PermitUserEnvironment=yes -o PasswordAuthentication=no; exec "$@"; }
exec /usr/sbin/sshd -D -e -p "$port" -o PermitUserEnvironment=yes -o PasswordAuthentication=no
