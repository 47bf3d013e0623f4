#!/usr/bin/env bash
# Builds the image and runs docker-compose.yml for real, then tests/docker. Needs root. What is missing fails it, nothing is skipped.
# Usage: test_docker.sh BIN-DIRECTORY-OF-THE-ENVIRONMENT [PYTEST-ARGUMENT...]
#
# Uses the Docker daemon that can be reached. If there is none, it starts one of its own in a temporary directory, without touching
# the host's firewall, and ends it afterwards. If debian:bookworm-slim is neither there nor to be had from a registry, debootstrap
# makes it; that is kept in ~/.cache/jobrunner for the next run.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$(cd "$1" && pwd)
shift
base=debian:bookworm-slim
cache=${XDG_CACHE_HOME:-$HOME/.cache}/jobrunner
work=$(mktemp -d "${TMPDIR:-/tmp}/jobrunner-docker.XXXXXX")
daemon=
built=
# Where this host has its packages from, if they are of the same suite as the image's.
sources=/etc/apt/sources.list.d/debian.sources
grep -q '^Suites:.*bookworm' "$sources" 2>/dev/null || sources=

say() { printf '# %s (%d s)\n' "$*" "$SECONDS"; }

fail() {
    echo "cannot test the container: $*" >&2
    exit 1
}

need() { command -v "$1" >/dev/null || fail "$1 is missing; apt-get install $2"; }

finish() {
    [ -z "$built" ] || "$docker" image rm -f "$JOBRUNNER_IMAGE" >/dev/null 2>&1 || true
    if [ -n "$daemon" ]; then
        kill -TERM "$daemon" 2>/dev/null && wait "$daemon" || true
        # The parents of all containers' and builds' cgroups, which Docker leaves; those that another daemon uses are busy.
        find /sys/fs/cgroup -depth -maxdepth 3 \( -name docker -o -path '*/docker/buildkit' \) -exec rmdir {} \; 2>/dev/null || true
    fi
    if grep -F " $work/" /proc/self/mountinfo >&2; then
        echo "test_docker.sh: these mounts were left behind" >&2
        exit 1
    fi
    rm -rf "$work"
}

# A client that has BuildKit: by buildx, or built in, as it was up to version 22.
client() {
    local candidate
    for candidate in $(type -ap docker); do
        if "$candidate" buildx version >/dev/null 2>&1 ||
            [ "$("$candidate" --version | sed 's/[^0-9]*\([0-9]*\).*/\1/')" -lt 23 ]; then
            echo "$candidate"
            return
        fi
    done
    fail "no docker command with BuildKit; apt-get install docker.io (Debian 12) or docker-buildx"
}

start_daemon() {
    export DOCKER_HOST=unix://$work/docker.sock
    need dockerd docker.io
    dockerd --host "$DOCKER_HOST" --data-root "$work/data" --exec-root "$work/exec" --pidfile "$work/pid" \
        --bridge=none --iptables=false --ip6tables=false --ip-forward=false >"$work/dockerd.log" 2>&1 &
    daemon=$!
    until "$docker" info >/dev/null 2>&1; do
        kill -0 "$daemon" 2>/dev/null || { daemon= && tail -n 5 "$work/dockerd.log" >&2 && fail "dockerd did not start"; }
        sleep 0.2
    done
}

# As the official image is made: without documentation, and with a dpkg that does not sync each file.
make_base() {
    local root=$work/base mirror=
    need debootstrap debootstrap
    [ -z "$sources" ] || mirror=$(sed -n 's/^URIs: *\([^ ]*\).*/\1/p;T;q' "$sources")
    debootstrap --variant=minbase --foreign bookworm "$root" $mirror >"$work/debootstrap.log" || { tail "$work/debootstrap.log" >&2 && return 1; }
    mkdir -p "$root/etc/dpkg/dpkg.cfg.d" "$cache"
    printf '%s\n' force-unsafe-io path-exclude=/usr/share/{doc,info,locale,man}/* >"$root/etc/dpkg/dpkg.cfg.d/slim"
    chroot "$root" /debootstrap/debootstrap --second-stage >>"$work/debootstrap.log" || { tail "$work/debootstrap.log" >&2 && return 1; }
    [ -z "$sources" ] || { rm -f "$root/etc/apt/sources.list" && cp "$sources" "$root/etc/apt/sources.list.d/debian.sources"; }
    rm -rf "$root"/usr/share/{doc,info,locale,man}/* "$root"/var/{cache,lib}/apt/*/* "$root"/var/log/*
    tar -C "$root" -cf "$cache/bookworm-slim.tar.part" .
    mv "$cache/bookworm-slim.tar.part" "$cache/bookworm-slim.tar"
    rm -rf "$root"
}

# What this host knows of the way to the package registries, for the build alone.
secrets() {
    {
        echo "[global]"
        "$bin/pip" config list | sed -n "s/^[^.]*\.\(index-url\|proxy\|trusted-host\)='\(.*\)'$/\1 = \2/p" | grep -v file: || true
        [ ! -e /etc/ssl/certs/ca-certificates.crt ] || echo "cert = /etc/ssl/certs/ca-certificates.crt"
    } >"$work/pip.conf"
    echo "--secret id=pip-conf,src=$work/pip.conf"
    [ ! -e /etc/ssl/certs/ca-certificates.crt ] || echo "--secret id=ca-certificates,src=/etc/ssl/certs/ca-certificates.crt"
    [ -z "$sources" ] || echo "--secret id=apt-sources,src=$sources"
}

trap finish EXIT
[ "$(id -u)" = 0 ] || fail "it needs root; run: sudo make test-docker"
need docker docker.io
docker=$(client)
compose="$docker compose"
$compose version >/dev/null 2>&1 || { need docker-compose docker-compose && compose=docker-compose; }
"$docker" info >/dev/null 2>&1 || start_daemon
say "$("$docker" version -f 'Docker {{.Server.Version}}'), $($compose version --short), ${daemon:+a daemon of our own}"

if ! "$docker" image inspect "$base" >/dev/null 2>&1 && ! timeout 120 "$docker" pull -q "$base" >"$work/pull.log" 2>&1; then
    [ -e "$cache/bookworm-slim.tar" ] || make_base || fail "debootstrap failed"
    "$docker" import -c 'CMD ["bash"]' "$cache/bookworm-slim.tar" "$base" >/dev/null
fi
say "$base is there"

export JOBRUNNER_IMAGE=jobrunner-test COMPOSE_PROJECT_NAME=jobrunner-test
built=yes
# shellcheck disable=SC2046 # words are meant
DOCKER_BUILDKIT=1 "$docker" build --quiet --network host $(secrets) --tag "$JOBRUNNER_IMAGE" . >"$work/build.log" 2>&1 ||
    { cat "$work/build.log" >&2 && fail "docker build failed"; }
size() { echo $(($("$docker" image inspect -f '{{.Size}}' "$1") / 1000000)); }
say "image built: $(size "$JOBRUNNER_IMAGE") MB, of which $base $(size "$base") MB"

JOBRUNNER_MUST_RUN=1 JOBRUNNER_TEST_DOCKER=$docker JOBRUNNER_TEST_COMPOSE=$compose "$bin/pytest" tests/docker "$@"
say "done"
