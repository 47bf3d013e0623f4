#!/usr/bin/env bash
# The original design's examples, in their order, through the CLI, over mutual TLS, against a server of their own.
# Usage: demo.sh BIN-DIRECTORY-OF-THE-ENVIRONMENT. Fails if any answer is not what the design says.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$1
dir=$(mktemp -d)
server=
JOBRUNNER_ADDRESS=

finish() {
    # Jobs outlive their server: a demo that failed half-way must not leave one.
    [ -z "$server" ] || [ -z "$JOBRUNNER_ADDRESS" ] || for id in $(as_admin ls -q --status running 2>/dev/null); do
        as_admin stop --grace 0 "$id" || true
    done
    [ -z "$server" ] || { kill -TERM "$server" 2>/dev/null && wait "$server"; } || true
    rm -rf "$dir"
}
trap finish EXIT

as_admin() { JOBRUNNER_CERT="$dir/certs/admin.pem" JOBRUNNER_KEY="$dir/certs/admin.key" "$bin/jobrunner" "$@"; }

fail() {
    echo "demo failed: $*" >&2
    exit 1
}

say() { printf '\n# %s\n' "$*"; }

# show COMMAND...: echoes the command as a person would type it, runs it, keeps its output in $out and its code in $code.
show() {
    local word typed=
    for word; do
        [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]] || word="\"$word\""
        typed+=" $word"
    done
    printf '$%s\n' "$typed"
    code=0
    PATH="$bin:$PATH" "$@" >"$dir/out" 2>&1 || code=$?
    cat "$dir/out"
    out=$(<"$dir/out")
    [ "$code" = 0 ] || echo "(exit code $code)"
}

started() { [[ $out =~ ^Started\ job\ with\ ID:\ ([0-9a-f]{12})$ ]] && id=${BASH_REMATCH[1]} || fail "no job id: $out"; }
expect() { [[ $out == "$1" ]] || fail "expected: $1"; }

bin=$(cd "$bin" && pwd)
"$bin/python" dev-certs/make_certs.py --out "$dir/certs"

# The server says on standard error where it listens; the FIFO is open both ways, so that neither side waits for the other.
mkfifo "$dir/said"
exec 3<>"$dir/said"
"$bin/jobrunnerd" serve --listen 127.0.0.1:0 --state-dir "$dir/state" \
    --ca "$dir/certs/ca.pem" --cert "$dir/certs/server.pem" --key "$dir/certs/server.key" >&3 2>&3 &
server=$!
while [ -z "$JOBRUNNER_ADDRESS" ]; do
    if read -r -t 1 -u 3 line; then
        [[ $line =~ ^listening\ on\ (.+)$ ]] && JOBRUNNER_ADDRESS=${BASH_REMATCH[1]}
        said=$line
    else
        kill -0 "$server" 2>/dev/null || { server= && fail "the server did not start: ${said:-it said nothing}"; }
    fi
done
export JOBRUNNER_ADDRESS JOBRUNNER_CA="$dir/certs/ca.pem" JOBRUNNER_CERT="$dir/certs/admin.pem" JOBRUNNER_KEY="$dir/certs/admin.key"
echo "# a server on $JOBRUNNER_ADDRESS, TLS 1.3; this client's certificate says: admin"

say "Starting a job"
show jobrunner start echo "Hello World"
started
hello=$id

say "Starting a job with flags/options: -- ends the options"
show jobrunner start -- bash -c "echo Hello World"
started

say "Stopping a job; this one has ended by itself already, which is no error"
as_admin wait "$hello" >/dev/null
show jobrunner stop "$hello"
[ "$code" = 0 ] || fail "stop of an ended job exits with $code"

say "Query job status: running, completed, failed or terminated"
show jobrunner status "$hello"
expect completed

say "Viewing job output"
show jobrunner log "$hello"
expect "Hello World"

say "Streaming job output"
show jobrunner log -f "$hello"
expect "Hello World"

say "The same verbs on a job that runs: it is stopped, with its children"
show jobrunner start -n ticker -- bash -c "sleep 1000 & echo ticking; wait"
started
show jobrunner status "$id"
expect running
show jobrunner stop "$id"
show jobrunner status "$id"
expect terminated

say "What the design left for the future: names, and a list"
show jobrunner ls
[[ $out == *ticker* && $out == *"$hello"* ]] || fail "ls misses a job"

say "Limits hold: tail reads for the end of a line that never comes"
show jobrunner run --memory 64MiB -- tail /dev/zero
[ "$code" != 0 ] || fail "the job was not stopped by its memory limit"

say "A viewer may look, and start nothing"
export JOBRUNNER_CERT="$dir/certs/viewer.pem" JOBRUNNER_KEY="$dir/certs/viewer.key"
show jobrunner status "$hello"
expect completed
show jobrunner start echo "Hello World"
[ "$code" = 77 ] || fail "a viewer's start exits with $code"

say "done in $SECONDS s"
