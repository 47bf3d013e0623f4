"""Where the settings come from: the one place where they are read.

A key is looked for on the command line, then in the environment (`JOBRUNNERD_` and its name in capitals), then in the TOML file,
and has its default otherwise. Tables are in the file alone: limits, `[defaults]` and `[ceilings]`, and what jobs may ask for by
name (offers.py). What is not known is refused, so that no misspelt limit is silently off. Relative paths in the file start at its
directory.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from jobrunner import bounds, checked
from jobrunner.bounds import Bounds
from jobrunner.config import DEFAULTS, RunnerConfig, ServerConfig
from jobrunner.errors import ConfigError, InvalidRequest
from jobrunner.job import Limits
from jobrunner.limits import MIN_DIRECTORY
from jobrunner.offers import TABLES, Offers
from jobrunner.units import is_loopback

__all__ = ["KEYS", "LIMIT_KEYS", "load", "load_runner"]

PREFIX = "JOBRUNNERD_"
CONFIG_VARIABLE = "JOBRUNNERD_CONFIG"
STATE_DIR = Path("/var/lib/jobrunner")
"""Where a check looks if nothing says where root's jobs are kept; root's server must be told."""
ON_SHUTDOWN = ("keep", "stop")
LOG_FORMATS = ("text", "json")
ON_WRITE_ERROR = ("continue", "stop")
_KUBERNETES = re.compile(r"JOBRUNNERD_(SERVICE_HOST|SERVICE_PORT.*|PORT(_.*)?)")
"""Set in every pod of a namespace that has a service named jobrunnerd; none of them is ours."""

KEYS: Mapping[str, Callable[[object], Any]] = {
    "state_dir": checked.path,
    "node": checked.text,
    "cgroup_parent": checked.text,
    "grace": checked.between(checked.seconds, 0, 86400),
    "start_timeout": checked.between(checked.seconds, 1, 3600),
    "max_running": checked.between(checked.whole, 1, 1_000_000),
    "keep_jobs": checked.or_none(checked.between(checked.whole, 0, 1_000_000)),
    "keep_age": checked.or_none(checked.between(checked.seconds, 0, 10 * 365 * 86400)),
    "keep_bytes": checked.or_none(checked.between(checked.size, 0, 1 << 62)),
    "max_running_per_user": checked.between(checked.whole, 1, 1_000_000),
    "segment_bytes": checked.between(checked.size, 4096, 1 << 40),
    "on_write_error": checked.word(*ON_WRITE_ERROR),
    "workspaces": checked.flag,
    "workspaces_per_user": checked.between(checked.whole, 1, 1_000_000),
    "workspace_size": checked.or_none(checked.between(checked.size, MIN_DIRECTORY, 1 << 62)),
    "work_quota": checked.or_none(checked.between(checked.size, MIN_DIRECTORY, 1 << 62)),
    "project_ids": checked.id_range,
    "network_host": checked.flag,
    "job_uids": checked.id_range,
    "show": checked.host_paths,
    "hide": checked.host_paths,
    "allow_missing": checked.limit_names,
    "ca": checked.path,
    "cert": checked.path,
    "key": checked.path,
    "crl": checked.path,
    "audit_log": checked.path,
    "key_passphrase_file": checked.path,
    "listen": checked.listen,
    "metrics_listen": checked.listen,
    "metrics_anywhere": checked.flag,
    "metrics_hosts": checked.host_names,
    "viewer_output": checked.flag,
    "log_level": checked.log_level,
    "log_format": checked.word(*LOG_FORMATS),
    "on_shutdown": checked.word(*ON_SHUTDOWN),
    "shutdown_grace": checked.between(checked.seconds, 0, 86400),
    **bounds.READERS,
}
"""Every key, and how its value is read, from whichever place."""

LIMIT_KEYS: Mapping[str, Callable[[object], Any]] = {
    "cpus": checked.number,
    "memory": checked.size,
    "pids": checked.whole,
    "read_bps": checked.size,
    "write_bps": checked.size,
    "read_iops": checked.whole,
    "write_iops": checked.whole,
    "open_files": checked.whole,
    "tmp_size": checked.size,
    "work_size": checked.size,
    "timeout": checked.seconds,
    "idle_timeout": checked.seconds,
    "output_limit": checked.size,
}
"""The keys of `[ceilings]`. `none` means no limit."""

DEFAULT_KEYS: Mapping[str, Callable[[object], Any]] = {**LIMIT_KEYS, "output_policy": checked.output_policy}
"""The keys of `[defaults]`."""

REQUIRED = ("state_dir", "ca", "cert", "key")


def load(toml_file: Path | None, environ: Mapping[str, str], overrides: Mapping[str, object]) -> ServerConfig:
    """Read the settings: `overrides` are the command line's, a value of None there means that it was not given.

    Without `toml_file`, the file that JOBRUNNERD_CONFIG names, if it names one. Raises ConfigError: place, key, reason.
    """
    toml_file = toml_file or _named(environ)
    found = _found(toml_file, environ, overrides)
    if os.geteuid() != 0 and "state_dir" not in found:
        found["state_dir"] = _users_state_dir(environ)
    for key in REQUIRED:
        if key not in found:
            where = f"configuration {toml_file}" if toml_file else "configuration"
            raise ConfigError(where, f"{key}: is not set; give --{key.replace('_', '-')} or {PREFIX}{key.upper()}")
    own = {field.name for field in fields(ServerConfig)}
    runner = _runner(found)
    # Jobs may see the directory that it is in, /etc for instance.
    runner = replace(runner, hide=(*runner.hide, os.path.realpath(found["key"])))
    return ServerConfig(runner=runner, **{key: value for key, value in found.items() if key in own})


def load_runner(toml_file: Path | None, environ: Mapping[str, str], overrides: Mapping[str, object]) -> RunnerConfig:
    """The library's part of the same settings, for what needs no network; nothing is required. Raises ConfigError."""
    found = _found(toml_file or _named(environ), environ, overrides)
    if "state_dir" not in found:
        found["state_dir"] = STATE_DIR if os.geteuid() == 0 else _users_state_dir(environ)
    return _runner(found)


def _users_state_dir(environ: Mapping[str, str]) -> Path:
    """Where a server that is not root keeps its jobs (XDG Base Directory Specification, which has no relative paths)."""
    given, home = Path(environ.get("XDG_STATE_HOME", "")), environ.get("HOME", "")
    if given.is_absolute():
        return given / "jobrunner"
    if not home:
        raise ConfigError("configuration", "state_dir: is not set, and neither is HOME")
    return Path(home, ".local/state/jobrunner")


def _named(environ: Mapping[str, str]) -> Path | None:
    return Path(environ[CONFIG_VARIABLE]) if environ.get(CONFIG_VARIABLE) else None


def _found(toml_file: Path | None, environ: Mapping[str, str], overrides: Mapping[str, object]) -> dict[str, Any]:
    found, limits = _from_file(toml_file) if toml_file else ({}, {})
    found |= _from_environment(environ)
    given = {key: value for key, value in overrides.items() if value is not None}
    found |= limits | dict(_converted("the command line", given, KEYS))
    if "metrics_listen" in found and not found.get("metrics_anywhere") and not is_loopback(found["metrics_listen"]):
        reason = "is not an address of loopback, and metrics are for everyone there; `metrics_anywhere = true` allows it"
        raise ConfigError("configuration", f"metrics_listen: {found['metrics_listen']} {reason}")
    found["bounds"] = Bounds(**{key: found.pop(key) for key in bounds.READERS.keys() & found.keys()})
    return found


def _runner(found: Mapping[str, Any]) -> RunnerConfig:
    own = {field.name for field in fields(RunnerConfig)}
    return RunnerConfig(**{key: value for key, value in found.items() if key in own})


def _from_file(file: Path) -> tuple[dict[str, Any], dict[str, Limits]]:
    what = f"configuration {file}"
    try:
        raw = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as exc:
        raise ConfigError(what, exc.strerror or str(exc)) from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(what, str(exc)) from exc
    except RecursionError as exc:
        raise ConfigError(what, "its values are nested too deeply") from exc
    given = {name: raw.pop(name, {}) for name in ("defaults", "ceilings")}
    offered = {name: raw.pop(name, {}) for name in TABLES}
    found = dict(_converted(what, raw, KEYS))
    base = file.absolute().parent
    found |= {key: base / value for key, value in found.items() if isinstance(value, Path)}
    found["offers"] = Offers(**dict(_converted(what, offered, TABLES)))
    return found, _limits(what, given)


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    given = {
        name.removeprefix(PREFIX).lower(): value
        for name, value in environ.items()
        if name.startswith(PREFIX) and name != CONFIG_VARIABLE and not _KUBERNETES.fullmatch(name)
    }
    return dict(_converted("the environment", given, KEYS, name_of=lambda key: PREFIX + key.upper()))


def _limits(what: str, given: Mapping[str, object]) -> dict[str, Limits]:
    tables = {}
    for name, table in given.items():
        if not isinstance(table, dict):
            raise ConfigError(what, f"{name}: is not a table")
        unset = {key for key, value in table.items() if value == "none"}
        base = {field.name: getattr(DEFAULTS, field.name) for field in fields(Limits)} if name == "defaults" else {}
        given_values = {key: value for key, value in table.items() if key not in unset}
        keys = DEFAULT_KEYS if name == "defaults" else LIMIT_KEYS
        values = dict(_converted(what, given_values, keys, name_of=f"{name}.{{}}".format))
        for key in unset - set(keys):
            raise ConfigError(what, f"{name}.{key}: is not known")
        try:
            tables[name] = Limits(**base | values | dict.fromkeys(unset))
            tables[name].check_floors()
        except InvalidRequest as exc:
            raise ConfigError(what, f"{name}.{exc.field.removeprefix('limits.')}: {exc.reason}") from exc
    set_by_hand = given["defaults"] if isinstance(given["defaults"], dict) else {}
    for key in LIMIT_KEYS:
        default, ceiling = (getattr(tables[name], key) for name in ("defaults", "ceilings"))
        if None in (default, ceiling) or default <= ceiling:
            continue
        if key in set_by_hand:
            raise ConfigError(what, f"defaults.{key}: {default} is above ceilings.{key}, {ceiling}")
        tables["defaults"] = replace(tables["defaults"], **{key: ceiling})  # jobrunner's own default gives way
    return tables


def _converted(
    what: str, given: Mapping[str, object], keys: Mapping[str, Callable[[object], Any]], name_of: Callable[[str], str] = str
) -> Iterator[tuple[str, Any]]:
    for key, value in given.items():
        if key not in keys:
            raise ConfigError(what, f"{name_of(key)}: is not known")
        try:
            yield key, keys[key](value)
        except ValueError as exc:
            raise ConfigError(what, f"{name_of(key)}: {exc}") from exc
