"""The settings: the library's, and the server's, which has the library's in it. settings.py reads them."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path

from jobrunner.bounds import Bounds
from jobrunner.errors import ConfigError
from jobrunner.identity import PROJECT_IDS, range_of
from jobrunner.job import Limits, OutputPolicy
from jobrunner.offers import Offers

__all__ = ["BOUNDS", "DEFAULTS", "NO_LIMITS", "NO_OFFERS", "RunnerConfig", "ServerConfig"]

DEFAULTS = Limits(
    cpus=1.0,
    memory=1 << 30,
    pids=512,
    read_bps=100_000_000,
    write_bps=100_000_000,
    tmp_size=256 << 20,
    output_limit=1 << 30,
    output_policy=OutputPolicy.DROP_OLDEST,
)
NO_LIMITS = Limits()
NO_OFFERS = Offers()
BOUNDS = Bounds()


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerConfig:
    """The library's settings."""

    state_dir: Path
    node: str = ""
    """This host's name in every job's info; empty means what gethostname(2) says."""
    cgroup_parent: str = ""
    """A path in every cgroup hierarchy; empty means the server's own cgroup."""
    defaults: Limits = DEFAULTS
    ceilings: Limits = NO_LIMITS
    grace: float = 10.0
    """Seconds between the stop signal and the kill, for jobs that do not say."""
    start_timeout: float = 60.0
    """Seconds within which a job's command has to be executed: past that a file system that it needs is taken for dead."""
    max_running: int = 1000
    keep_jobs: int | None = 20_000
    """Ended jobs that are kept, with their output; past that the one that ended first is removed. None for any number."""
    keep_age: float | None = None
    """Seconds that an ended job is kept."""
    keep_bytes: int | None = None
    """Bytes of output of all ended jobs together, and of their work directories where project quotas count them."""
    max_running_per_user: int = 1000
    segment_bytes: int = 16 << 20
    """Size of a file of a job's log: dropped whole, so an eighth of the job's output limit at most, and a 64th at least."""
    on_write_error: str = "continue"
    """What becomes of a job whose output cannot be written: `continue` counts what is lost and tells it, `stop` ends the job."""
    offers: Offers = NO_OFFERS
    """Root file systems, volumes and users that a job may ask for."""
    workspaces: bool = False
    """Whether a job may ask for a directory that is kept for its user's next one."""
    workspaces_per_user: int = 100
    """How many of them a user may have."""
    workspace_size: int | None = None
    """Bytes that each of them may take: with project quotas alone. None: as large as the disk."""
    work_quota: int | None = 10 << 30
    """Bytes of /work on disk for jobs that have no `work_size`, where the file system has project quotas. None for no bound."""
    project_ids: tuple[int, int] = PROJECT_IDS
    """First and count: each directory that a project quota bounds has a project of its own."""
    network_host: bool = False
    """Whether a job may ask for the host's network instead of none."""
    job_uids: tuple[int, int] = (0, 0)
    """First and count: every running job has a uid of its own, and a gid of that number; the first is workspaces'. (0, 0): one
    of 4096 ranges, by the state directory's path."""
    show: tuple[str, ...] = ()
    """What jobs see of the host besides /usr, /bin, /sbin, /lib*, /etc and /opt."""
    hide: tuple[str, ...] = ()
    """What they do not see of it, besides what is a secret on every host."""
    allow_missing: tuple[str, ...] = ()
    """Names of limits that this host may lack, `read_bps` for instance."""

    def __post_init__(self) -> None:
        if not self.node:
            object.__setattr__(self, "node", socket.gethostname())
        if self.job_uids == (0, 0):
            object.__setattr__(self, "job_uids", range_of(self.state_dir))
        self.offers.check(self.state_dir.absolute(), self.show)
        first, count = self.job_uids
        for name, user in self.offers.users.items():
            if any(first <= number < first + count for number in user.id):
                raise ConfigError("users", f"{name}: {user.id} is in job_uids, {first}:{count}, whose uids are of one job each")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """The server's settings: the library's and the network's."""

    runner: RunnerConfig
    ca: Path
    cert: Path
    key: Path
    crl: Path | None = None
    """Revocation lists, PEM, one of each CA in `ca`; none for no check."""
    key_passphrase_file: Path | None = None
    """Its first line opens `key`."""
    audit_log: Path | None = None
    """JSON lines, who did what; none for no such file."""
    listen: str = "127.0.0.1:7443"
    """HOST:PORT or [ADDRESS]:PORT; port 0 is any free one."""
    metrics_listen: str | None = None
    """Where Prometheus may ask, in plain HTTP; as `listen`. None for nowhere."""
    metrics_anywhere: bool = False
    """Whether that may be another address than one of this host's loopback."""
    metrics_hosts: tuple[str, ...] = ()
    """Names by which it may be asked, besides `localhost`, that of `metrics_listen` and addresses."""
    viewer_output: bool = True
    """Whether viewers may read output, not only state."""
    bounds: Bounds = BOUNDS
    """What one peer can take."""
    log_level: str = "info"
    log_format: str = "text"
    """`text` for people, `json` for programs."""
    on_shutdown: str = "keep"
    """What becomes of the jobs that run when the server is told to leave: `keep` lets them run on, `stop` stops them first."""
    shutdown_grace: float = 5.0
    """Seconds that `stop` gives a job at most: less than what a container's runtime gives the server, 10 s with docker stop."""
