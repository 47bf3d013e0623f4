#!/usr/bin/env bash
# The power fails: the virtual machine's emulator is killed at random moments while a server in it starts, ends, stops and removes
# jobs, and is booted again on the same disk. Usage: power.sh BIN-DIRECTORY-OF-THE-ENVIRONMENT
#
# The state directory is on an ext4 file system of its own, /dev/vdc. What the guest's kernel has not written is lost with it, whatever
# the host does; `cache=none` adds that nothing of the disk is only in the host's page cache, and that the guest's flushes reach the
# host's disk. A host that loses its power in the same instant would lose no more than they promise.
set -euo pipefail
bin=$(cd "$1" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
checkout=$here/../..
disk_options=snapshot=on # or a kill would tear what the guest has cached there
. "$here/machine.sh"

make_disk env -u PYTHONPYCACHEPREFIX python -m tests.vm.power_guest
truncate -s 256M "$work/state.ext4"
mkfs.ext4 -q -F "$work/state.ext4"
truncate -s 1M "$work/told"
machine+=(
    -drive "file=$work/state.ext4,format=raw,if=virtio,cache=none"
    -drive "file=$work/told,format=raw,if=virtio,cache=unsafe,readonly=on"
)
cd "$checkout"
"$bin/python" -m tests.vm.power_host "$work" "${machine[@]}"
