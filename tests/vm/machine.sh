# Sourced by run.sh and power.sh: the virtual machine's kernel and root file system, and how it is booted. Needs `bin`, `here`, `checkout`;
# `disk_options` is how qemu opens the second disk.
# shellcheck shell=bash disable=SC2154
cache=${JOBRUNNER_VM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/jobrunner-vm}
accel=${JOBRUNNER_VM_ACCEL:-tcg}
factor=${JOBRUNNER_TIME_FACTOR:-10}
verbosity=${JOBRUNNER_VM_KERNEL:-quiet systemd.show_status=false}

lacks() { echo "cannot test in a virtual machine: $1 is missing; install it: apt-get install $2" >&2 && exit 1; }
[ "$(id -u)" = 0 ] || { echo "cannot test in a virtual machine: its image is made as root; run: sudo make test-vm" >&2 && exit 1; }
command -v qemu-system-x86_64 >/dev/null || lacks qemu-system-x86_64 qemu-system-x86
command -v mkfs.ext4 >/dev/null || lacks mkfs.ext4 e2fsprogs
kernel=$(find /boot -name 'vmlinuz-*-amd64' ! -name '*cloud*' | sort -V | tail -1)
[ -n "$kernel" ] || lacks "a kernel of Debian" linux-image-amd64
initrd=${kernel/vmlinuz/initrd.img}
command -v modprobe >/dev/null || lacks modprobe kmod
[ -e "$initrd" ] || lacks "$initrd" "initramfs-tools, then: update-initramfs -c -k ${kernel#*vmlinuz-}"

image=$cache/$(cat "$here/image.sh" "$checkout/requirements.lock" | sha256sum | head -c 16).ext4
if [ ! -e "$image" ]; then
    command -v debootstrap >/dev/null || lacks debootstrap debootstrap
    mkdir -p "$cache"
    rm -f "$cache"/*.ext4
    echo "making the root file system of the virtual machine, once: $image"
    "$here/image.sh" "$bin/pip" "$image"
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# make_disk COMMAND...: the second disk, with this checkout and what its guest is to run.
make_disk() {
    mkdir -p "$work/disk/checkout" "$work/disk/tmp" "$work/disk/modules"
    "$bin/pip" install -qq --disable-pip-version-check --no-deps --no-build-isolation --target "$work/disk/site" "$checkout"
    cp -a "$checkout"/{tests,packaging,pyproject.toml} "$work/disk/checkout"
    find "$work/disk/checkout" -name __pycache__ -prune -exec rm -rf {} +
    # What the tests need of Debian's kernel that is neither built in nor in its initrd: disks that are made of files, quotas, file systems.
    # In the order in which one needs the other.
    for module in loop quota_v2 xfs btrfs dm-mod dm-multipath dm-round-robin overlay vsock; do
        modprobe --dirname / --set-version "${kernel#*vmlinuz-}" --show-depends "$module" | sed -n 's/^insmod //p'
    done | awk '!seen[$1]++ { printf "%s %02d-", $1, NR; n = split($1, names, "/"); print names[n] }' | while read -r from name; do
        cp "$from" "$work/disk/modules/$name"
    done
    printf '%q ' "$@" >"$work/disk/command"
    echo "$factor" >"$work/disk/factor"
    truncate -s 3G "$work/disk.ext4"
    mkfs.ext4 -q -F -d "$work/disk" "$work/disk.ext4"
}

# The second serial line brings what the guest's command tells; the first one is its console. Nothing is written to the image: snapshot.
machine=(
    qemu-system-x86_64 -accel "$accel" -cpu max -smp 2 -m 2G -nodefaults -display none -no-reboot
    -kernel "$kernel" -initrd "$initrd"
    -append "root=/dev/vda rw console=ttyS0 $verbosity panic=-1 mitigations=off nokaslr"
    -drive "file=$image,format=raw,if=virtio,snapshot=on" -drive "file=$work/disk.ext4,format=raw,if=virtio,${disk_options:-cache=unsafe}"
    -serial stdio -serial "file:$work/result" -device virtio-rng-pci
)
