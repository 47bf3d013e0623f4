#!/usr/bin/env bash
# Makes the root file system that the virtual machine boots: Debian 12 with systemd 252, Python 3.11, and what the lock file pins.
# Usage: image.sh PIP IMAGE. Needs root, debootstrap and mkfs.ext4. Nothing of this checkout is in it, but the lock file's packages.
set -euo pipefail
pip=$1 image=$2
here=$(cd "$(dirname "$0")" && pwd)
lock=$here/../../requirements.lock
suite=bookworm
work=$(mktemp -d "$image.XXXXXX")
root=$work/root
trap 'rm -rf "$work"' EXIT

packages=systemd,systemd-sysv,dbus,kmod,libcap2-bin,python3,python3-venv,btrfs-progs,dmsetup,xfsprogs
debootstrap --variant=minbase --include="$packages" "$suite" "$root" ${JOBRUNNER_VM_MIRROR:+"$JOBRUNNER_VM_MIRROR"} >"$work/log" ||
    { cat "$work/log" >&2 && exit 1; }

# The unit's path. The environment has no pip: the packages are put into it from here, for the guest's Python.
chroot "$root" python3 -m venv --without-pip /opt/jobrunner
site=$root/opt/jobrunner/lib/python3.11/site-packages
# Without what checks and generates sources, which no test in the machine needs and of which not all is there as a wheel.
awk '/^[a-z]/ { wanted = $0 !~ /^(betterproto2-compiler|blockbuster|forbiddenfruit|grimp|grpcio(-tools)?|import-linter|mypy|ruff|types-.*)==/ } wanted' \
    "$lock" >"$work/requirements"
"$pip" install -qq --disable-pip-version-check --require-hashes --no-deps --only-binary=:all: --python-version 3.11 --no-compile \
    --target "$site" --requirement "$work/requirements"
chroot "$root" /opt/jobrunner/bin/python -m compileall -q /opt/jobrunner/lib

# This checkout comes on the second disk, which is made for each run.
echo /disk/site >"$site/checkout.pth"
for command in jobrunnerd=jobrunner.server.main jobrunner=jobrunner_cli.main; do
    printf '#!/opt/jobrunner/bin/python\nfrom %s import main\nmain()\n' "${command#*=}" >"$root/opt/jobrunner/bin/${command%=*}"
    chmod 755 "$root/opt/jobrunner/bin/${command%=*}"
done
mkdir -p "$root/disk"
echo jobrunner-vm >"$root/etc/hostname"
cat >"$root/etc/systemd/system/jobrunner-vm.service" <<'EOF'
[Unit]
Description=What this machine is booted for
FailureAction=poweroff-immediate
SuccessAction=poweroff-immediate

[Service]
Type=oneshot
Delegate=yes
# By itself: there is no udev that would tell systemd of the disk.
ExecStart=/bin/sh -c "mount /dev/vdb /disk && exec bash /disk/checkout/tests/vm/guest.sh"
StandardOutput=tty
StandardError=tty
TTYPath=/dev/ttyS0
EOF
ln -s /etc/systemd/system/jobrunner-vm.service "$root/etc/systemd/system/multi-user.target.wants/jobrunner-vm.service"
# What waits for a person, or does work of its own.
for unit in emergency.target rescue.target getty.target serial-getty@ttyS0.service systemd-timesyncd.service apt-daily.timer apt-daily-upgrade.timer \
    dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service fstrim.timer systemd-update-utmp.service; do
    ln -sf /dev/null "$root/etc/systemd/system/$unit"
done
rm -rf "$root/var/cache/apt" "$root/var/lib/apt/lists" "$root/usr/share/doc" "$root/usr/share/man" "$root/usr/share/locale"

truncate -s 2G "$work/image"
mkfs.ext4 -q -F -L root -d "$root" "$work/image"
mv "$work/image" "$image"
