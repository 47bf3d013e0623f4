#!/usr/bin/env bash
# Boots Debian, its kernel and systemd, in a virtual machine, and runs tests there: what is true of cgroup v2 and of the unit is
# proved on whatever host this is. Usage: run.sh BIN-DIRECTORY-OF-THE-ENVIRONMENT [PYTEST-ARGUMENT...]
#
# Ends with the exit code of pytest. The machine is emulated unless JOBRUNNER_VM_ACCEL=kvm, so it needs no hardware and is ten to
# twenty times slower than the host: bars of time are stretched by JOBRUNNER_TIME_FACTOR. Its root file system is made once for each
# lock file, in JOBRUNNER_VM_CACHE, and never written to.
set -euo pipefail
bin=$(cd "$1" && pwd)
shift
here=$(cd "$(dirname "$0")" && pwd)
checkout=$here/../..
what=("$@")
[ ${#what[@]} -gt 0 ] || what=(
    tests/kernel/test_{v2,endings,limits,disks,swap,cgroup_limits,namespaces,leftovers}.py
    tests/library/test_runner_{start,end,reopen}.py
    tests/library/test_{oom_of_helpers,usage}.py
    tests/hostile --ignore=tests/hostile/test_simulated.py
    tests/library/test_{volume,workspace}_attacks.py
    tests/kernel/test_overlay.py tests/library/test_writable.py
    tests/system/test_rootless.py
    tests/vm/test_{core,quota,unit,user,hardening}.py
)
. "$here/machine.sh"

make_disk python -m pytest -p no:cacheprovider --timeout=$((60 * factor)) --durations=15 --basetemp=/disk/tmp/pytest "${what[@]}"
begun=$SECONDS
timeout "${JOBRUNNER_VM_TIMEOUT:-1800}" "${machine[@]}" </dev/null || echo "qemu ended with exit code $?" >&2
result=$(tr -dc '0-9' <"$work/result")
echo "the virtual machine ran for $((SECONDS - begun)) s, exit code ${result:-unknown: it ended without telling}"
exit "${result:-1}"
