"""The server as a process: runner and server over each other, from the start to the end, and the signals in between."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import NamedTuple

import anyio

from jobrunner.config import ServerConfig
from jobrunner.runner import JobRunner
from jobrunner.server import control, logs
from jobrunner.server.account import Account
from jobrunner.server.app import JobServer
from jobrunner.server.audit import Audit
from jobrunner.server.exposition import ServerCollector
from jobrunner.server.health import HealthService
from jobrunner.server.metrics import Metrics
from jobrunner.server.notify import ServiceManager
from jobrunner.server.reflection import ReflectionService
from jobrunner.server.scrapes import exposed
from jobrunner.server.service import JobService
from jobrunner.server.trust import Trust
from jobrunner.wire import descriptors

__all__ = ["RunningServer", "running_server", "serve"]

logger = logging.getLogger(__name__)

SHUTDOWN_MARGIN = 30.0
"""Seconds that a shutdown may take beyond the grace period of its jobs: calls and connections that end, kills, the disk."""


class RunningServer(NamedTuple):
    """What `running_server` gives; addresses are HOST:PORT, and `metrics` is empty where there are none."""

    address: str
    metrics: str
    server: JobServer
    runner: JobRunner
    trust: Trust
    audit: Audit

    def read_again(self) -> None:
        """What SIGHUP asks for: the certificate files, and another audit log where the one before was renamed."""
        self.trust.ask()
        self.audit.reopen()


@asynccontextmanager
async def running_server(config: ServerConfig) -> AsyncIterator[RunningServer]:
    """A runner and a server over it, until it is left; that drains.

    Raises ConfigError for certificates, HostError for the host, the state directory and the addresses.
    """
    trust, audit = Trust(config), Audit(config.audit_log)
    account = Account(audit, Metrics())
    async with contextlib.AsyncExitStack() as last, JobRunner.open(config.runner, wait=False) as runner:
        last.callback(account.close)
        draining = anyio.Event()
        jobs = JobService(runner, draining, config.bounds, account.metrics)
        handlers = [jobs, HealthService(draining), ReflectionService(descriptors.load())]
        server = JobServer(handlers, config, trust, account, draining)
        collector = ServerCollector(server, runner, trust)
        async with exposed(config, collector, account) as metrics, server.serve() as address:
            keeper = asyncio.get_running_loop().create_task(server.keep_trust())
            try:
                yield RunningServer(address, metrics, server, runner, trust, audit)
            finally:
                keeper.cancel()


def serve(config: ServerConfig, ready: Callable[[str], None]) -> None:
    """Serve until a signal says otherwise. `ready` is given the address. Raises as `running_server`."""
    logs.begin(config.log_level, config.log_format)
    if sys.version_info < (3, 12):
        # The default watcher of Python 3.11 has a thread for each child; from 3.12 on this one is the default.
        asyncio.get_event_loop_policy().set_child_watcher(asyncio.PidfdChildWatcher())
    with asyncio.Runner() as runner:
        runner.run(_serve(config, ready))


async def _serve(config: ServerConfig, ready: Callable[[str], None]) -> None:
    stop = anyio.Event()
    asked = asyncio.Event()

    def told(number: int) -> None:
        if stop.is_set():
            os._exit(128 + number)
        jobs = "jobs run on" if config.on_shutdown == "keep" else "jobs are stopped"
        logger.info("%s: shutting down; %s", signal.Signals(number).name, jobs)
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told, number)
    loop.add_signal_handler(signal.SIGHUP, lambda: None)  # it would end a server that is about to come up
    manager = ServiceManager(os.environ)
    async with running_server(config) as running, contextlib.AsyncExitStack() as stack:
        stack.callback(control.Control(config.runner.state_dir, asked.set).close)
        draining = loop.create_task(_drain(running.runner, asked, stop))
        loop.add_signal_handler(signal.SIGHUP, running.read_again)
        ready(running.address)
        manager.ready(f"listening on {running.address}")
        alive = loop.create_task(manager.keep_alive())
        await stop.wait()
        manager.stopping("shutting down", config.shutdown_grace + SHUTDOWN_MARGIN)
        alive.cancel()
        draining.cancel()
        if config.on_shutdown == "stop":
            # Order: no new calls, then the stops, then the drain that leaving begins, so that who follows a job sees its end.
            running.server.draining.set()
            await running.runner.stop_all(grace=config.shutdown_grace, by="jobrunnerd")
            await running.server.finish_calls()


async def _drain(runner: JobRunner, asked: asyncio.Event, stop: anyio.Event) -> None:
    await asked.wait()
    logger.info("draining: no new jobs; leaving when the last of %d has ended", runner.running)
    await runner.drain()
    logger.info("drained: the last job has ended")
    stop.set()
