#!/usr/bin/env bash
# In the virtual machine, as a service with Delegate=yes: runs /disk/command, and tells its exit code on the second serial line.
set -uo pipefail
result=1
trap 'echo "$result" >/dev/ttyS1' EXIT
cut -d' ' -f1 /proc/uptime | xargs printf 'booted in %s s of the machine: '
uname -sr

# Into a leaf: a cgroup that hands controllers down holds no process. One that the server takes for its own.
cgroup=/sys/fs/cgroup$(cut -d: -f3 /proc/self/cgroup)/jobrunner-vm/server
mkdir -p "$cgroup"
echo $$ >"$cgroup/cgroup.procs"

# The initrd has loaded some of them.
for module in /disk/modules/*; do
    told=$(insmod "$module" 2>&1) || [[ $told == *"File exists"* ]] || { echo "$module: $told" && exit; }
done

# Swap, so that a job that may not use any can be told from one on a host that has none.
fallocate -l 256M /disk/swap && chmod 600 /disk/swap && mkswap -q /disk/swap && swapon /disk/swap || exit

export HOME=/root PATH=/opt/jobrunner/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export TMPDIR=/disk/tmp PYTHONPATH=/disk/checkout PYTHONPYCACHEPREFIX=/disk/pycache
export JOBRUNNER_MUST_RUN=1 JOBRUNNER_IN_VM=1
JOBRUNNER_TIME_FACTOR=$(</disk/factor)
export JOBRUNNER_TIME_FACTOR
cd /disk/checkout || exit
eval "$(</disk/command)"
result=$?
