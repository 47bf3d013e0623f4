"""Settings from command line, environment and file, and what is said about wrong ones."""

from __future__ import annotations

import pwd
import socket
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from jobrunner.bounds import Bounds
from jobrunner.config import DEFAULTS, RunnerConfig, ServerConfig
from jobrunner.errors import ConfigError
from jobrunner.job import Limits, OutputPolicy
from jobrunner.offers import Owner, Volume
from jobrunner.settings import KEYS, LIMIT_KEYS, load

CGROUP_DEFAULTS = Limits(cpus=1, memory=1 << 30, pids=512, read_bps=100_000_000, write_bps=100_000_000)
GIVEN = {"state_dir": "/state", "ca": "/ca", "cert": "/cert", "key": "/key"}


def from_file(tmp_path: Path, text: str, environ: dict[str, str] | None = None, **overrides: Any) -> ServerConfig:
    file = tmp_path / "jobrunnerd.toml"
    file.write_text(text)
    return load(file, environ or {}, GIVEN | overrides)


def test_defaults() -> None:
    config = load(None, {}, GIVEN)
    assert config == ServerConfig(
        runner=RunnerConfig(state_dir=Path("/state"), node=socket.gethostname(), hide=("/key",)),
        ca=Path("/ca"),
        cert=Path("/cert"),
        key=Path("/key"),
    )
    assert config.runner.defaults == DEFAULTS
    assert config.runner.ceilings == Limits()


def test_every_field_has_a_key_and_every_key_a_field() -> None:
    own = {field.name for field in (*fields(ServerConfig), *fields(RunnerConfig), *fields(Bounds))}
    assert set(KEYS) == own - {"runner", "bounds", "defaults", "ceilings", "offers"}


def test_the_command_line_is_before_the_environment_before_the_file(tmp_path: Path) -> None:
    text = 'listen = "[::1]:1"\ngrace = "1s"\nmax_running = 1\n'
    environ = {"JOBRUNNERD_GRACE": "2s", "JOBRUNNERD_MAX_RUNNING": "2"}
    config = from_file(tmp_path, text, environ, max_running=3, grace=None)
    assert (config.listen, config.runner.grace, config.runner.max_running) == ("[::1]:1", 2.0, 3)


def test_the_environment_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text('node = "n"')
    assert load(None, {"JOBRUNNERD_CONFIG": str(file)}, GIVEN).runner.node == "n"


def test_the_environment_alone_is_enough() -> None:
    environ = {f"JOBRUNNERD_{key.upper()}": value for key, value in GIVEN.items()}
    environ |= {"JOBRUNNERD_VIEWER_OUTPUT": "false", "JOBRUNNERD_ALLOW_MISSING": "read_bps,write_bps", "OTHER": "x"}
    config = load(None, environ, {})
    assert (config.ca, config.viewer_output, config.runner.allow_missing) == (Path("/ca"), False, ("read_bps", "write_bps"))


def test_variables_that_kubernetes_sets_for_a_service_are_not_ours() -> None:
    environ = {"JOBRUNNERD_SERVICE_HOST": "10.0.0.1", "JOBRUNNERD_PORT_7443_TCP": "tcp://10.0.0.1:7443", "JOBRUNNERD_PORT": "x"}
    assert load(None, environ, GIVEN) == load(None, {}, GIVEN)


def test_a_relative_path_in_the_file_starts_at_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('state_dir = "state"\nca = "tls/ca.pem"\ncert = "/abs"\nkey = "k"\n')
    config = load(file, {}, {"key": Path("given")})
    assert (config.runner.state_dir, config.ca) == (tmp_path / "state", tmp_path / "tls/ca.pem")
    assert (config.cert, config.key) == (Path("/abs"), Path("given"))


def test_limits_are_tables_over_the_defaults(tmp_path: Path) -> None:
    config = from_file(
        tmp_path, '[defaults]\nmemory = "64MiB"\nwrite_bps = "none"\ntimeout = "1h"\n[ceilings]\ncpus = 8\nmemory = "2G"\n'
    )
    assert config.runner.defaults == replace(DEFAULTS, memory=64 << 20, write_bps=None, timeout=3600.0)
    assert config.runner.ceilings == Limits(cpus=8, memory=2 * 10**9)


def test_what_jobs_may_ask_for_is_in_tables(tmp_path: Path) -> None:
    offers = from_file(
        tmp_path,
        """
        [roots]
        alpine = "/srv/alpine"
        [volumes]
        plain = "/srv/plain"
        sources = {path = "/srv/sources", read_only = true, owner = "0:0"}
        cache = {path = "/srv/cache", owner = "1000:100"}
        named = {path = "/srv/named", owner = "nobody"}
        nfs = {path = "/srv/nfs", owner = "keep"}
        """,
    ).runner.offers
    nobody = pwd.getpwnam("nobody")
    assert offers.roots == {"alpine": Path("/srv/alpine")}
    assert offers.volumes == {
        "plain": Volume(Path("/srv/plain")),
        "sources": Volume(Path("/srv/sources"), read_only=True, owner=Owner(0, 0)),
        "cache": Volume(Path("/srv/cache"), owner=Owner(1000, 100)),
        "named": Volume(Path("/srv/named"), owner=Owner(nobody.pw_uid, nobody.pw_gid)),
        "nfs": Volume(Path("/srv/nfs"), keep_owners=True),
    }


def test_limits_have_the_types_of_their_fields(tmp_path: Path) -> None:
    known = {"cpus": "0.5", "timeout": '"2s"', "idle_timeout": "1.5"}
    lines = [f"{key} = {known.get(key, '2000000')}" for key in LIMIT_KEYS]
    ceilings = from_file(
        tmp_path, "\n".join(["[defaults]", *(f'{key} = "none"' for key in LIMIT_KEYS), "[ceilings]", *lines])
    ).runner
    assert {getattr(ceilings.defaults, key) for key in LIMIT_KEYS} == {None}
    assert {type(getattr(ceilings.ceilings, key)) for key in set(LIMIT_KEYS) - set(known)} == {int}
    assert [getattr(ceilings.ceilings, key) for key in known] == [0.5, 2.0, 1.5]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("lisen = 'x'", "lisen: is not known"),
        ("[default]\ncpus = 1", "default: is not known"),
        ("[defaults]\ncpu = 1", "defaults.cpu: is not known"),
        ("[ceilings]\nmem = 'none'", "ceilings.mem: is not known"),
        ("defaults = 1", "defaults: is not a table"),
        ("[defaults]\nmemory = '64MB!'", "defaults.memory: '64MB!' is no size such as"),
        ("[defaults]\nmemory = 5", "defaults.memory: 5 is not between"),
        ("[defaults]\ncpus = true", "defaults.cpus: True is not a number"),
        ("[defaults]\ncpus = nan", "defaults.cpus: nan is not a number"),
        ("[defaults]\npids = 1.5", "defaults.pids: 1.5 is not a whole number"),
        (
            "[defaults]\nmemory = '1GiB'\n[ceilings]\nmemory = '512MiB'",
            "defaults.memory: 1073741824 is above ceilings.memory, 536870912",
        ),
        ("listen = 'host'", "listen: 'host' is no address such as"),
        ("listen = 7443", "listen: 7443 is not a text"),
        ("grace = '-1s'", "grace: '-1s' is no duration such as"),
        ("grace = 1e9", "grace: 1000000000.0 is not between 0 and 86400"),
        ("max_running = 0", "max_running: 0 is not between"),
        ("viewer_output = 1", "viewer_output: 1 is neither true nor false"),
        ("allow_missing = ['disk']", "allow_missing: 'disk' is none of cpus"),
        ("on_write_error = 'retry'", "on_write_error: 'retry' is none of continue, stop"),
        ("[defaults]\noutput_limit = '10k'", "defaults.output_limit: 10000 is not between 65536"),
        ("[defaults]\noutput_policy = 'loud'", "defaults.output_policy: 'loud' is none of drop-oldest, stop"),
        ("[ceilings]\noutput_policy = 'stop'", "ceilings.output_policy: is not known"),
        ("volumes = 1", "volumes: is not a table"),
        ("[volumes]\n'a b' = '/x'", "volumes: 'a b' is no name"),
        ("[volumes]\nx = 'relative'", "volumes: x: 'relative' is not an absolute path"),
        ("[volumes]\nx = {pth = '/x'}", "volumes: x: pth: is not known"),
        ("[volumes]\nx = {read_only = true}", "volumes: x: path: is not set"),
        ("[volumes]\nx = {path = '/x', read_only = 1}", "volumes: x: read_only: 1 is neither true nor false"),
        ("[volumes]\nx = {path = '/x', owner = '0:0'}", "volumes: x: owner: 0:0 is root, and a job must not write files of root's"),
        ("[volumes]\nx = {path = '/x', owner = '1000'}", "volumes: x: '1000' has no group"),
        ("[volumes]\nx = {path = '/x', owner = 'no-such-user'}", "volumes: x: 'no-such-user' is no user of this host"),
        ("[roots]\nx = 1", "roots: x: 1 is not an absolute path"),
        ("log_level = 'loud'", "log_level: 'loud' is none of"),
        ("state_dir = ''", "state_dir: is empty"),
        ("x = ", "Invalid value"),
    ],
)
def test_a_wrong_file_is_one_line_with_file_key_and_reason(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_file(tmp_path, text)
    assert caught.value.message.startswith(f"cannot read configuration {tmp_path / 'jobrunnerd.toml'}: {reason}")
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("environ", "overrides", "message"),
    [
        ({"JOBRUNNERD_LISTN": "x"}, {}, "cannot read the environment: JOBRUNNERD_LISTN: is not known"),
        ({"JOBRUNNERD_GRACE": "x"}, {}, "cannot read the environment: JOBRUNNERD_GRACE: 'x' is no duration such as"),
        ({}, {"listen": "x"}, "cannot read the command line: listen: 'x' is no address such as"),
        ({}, {"key": None}, "cannot read configuration: key: is not set; give --key or JOBRUNNERD_KEY"),
        ({"JOBRUNNERD_CONFIG": "/nonexistent"}, {}, "cannot read configuration /nonexistent: No such file or directory"),
    ],
)
def test_other_places_are_named_too(environ: dict[str, str], overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, environ, GIVEN | overrides)
    assert caught.value.message.startswith(message)


def test_the_defaults_are_what_the_documents_promise() -> None:
    own = Limits(tmp_size=256 << 20, output_limit=1 << 30, output_policy=OutputPolicy.DROP_OLDEST)
    assert own.over(CGROUP_DEFAULTS) == DEFAULTS


def test_the_output_policy_is_a_default(tmp_path: Path) -> None:
    config = from_file(tmp_path, 'on_write_error = "stop"\n[defaults]\noutput_policy = "stop"\noutput_limit = "64MiB"\n').runner
    assert (config.defaults.output_policy, config.defaults.output_limit) == (OutputPolicy.STOP, 64 << 20)
    assert config.on_write_error == "stop"


def test_the_servers_key_is_hidden_from_jobs(tmp_path: Path) -> None:
    key = tmp_path / "server.key"
    (tmp_path / "link.key").symlink_to(key)
    config = from_file(tmp_path, 'hide = ["/etc/mine"]', key=tmp_path / "link.key")
    assert config.runner.hide == ("/etc/mine", str(key))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('job_uids = "0:5"', "job_uids: '0:5' is no range of ids; root's is not for jobs"),
        ('job_uids = "5"', "job_uids: '5' is not FIRST:COUNT"),
        ('job_uids = "4294967290:10"', "job_uids: '4294967290:10' is no range"),
        ('show = ["/"]', "show: '/' is not an absolute path below /"),
        ('show = ["srv"]', "show: 'srv' is not an absolute path"),
        ('hide = ["/etc/../root"]', "hide: '/etc/../root' is not an absolute path"),
    ],
)
def test_what_is_no_range_or_path_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_file(tmp_path, text)
    assert reason in caught.value.message


@pytest.mark.parametrize("listen", ["127.0.0.1:1", "127.9.9.9:1", "[::1]:1", "localhost:1"])
def test_metrics_may_be_on_loopback(listen: str) -> None:
    assert load(None, {}, GIVEN | {"metrics_listen": listen}).metrics_listen == listen


@pytest.mark.parametrize("listen", ["0.0.0.0:1", "[::]:1", "10.0.0.1:1", "example.org:1"])
def test_metrics_are_for_everyone_only_with_a_word(listen: str) -> None:
    with pytest.raises(ConfigError, match=r"metrics_listen: .* is not an address of loopback.*metrics_anywhere = true"):
        load(None, {}, GIVEN | {"metrics_listen": listen})
    assert load(None, {"JOBRUNNERD_METRICS_ANYWHERE": "true"}, GIVEN | {"metrics_listen": listen}).metrics_listen == listen


def test_a_ceiling_below_jobrunner_s_own_default_lowers_it(tmp_path: Path) -> None:
    defaults = from_file(tmp_path, "[ceilings]\nmemory = '512MiB'\npids = 2000\n").runner.defaults
    assert (defaults.memory, defaults.pids) == (512 << 20, 512)
