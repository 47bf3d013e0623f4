"""The units of packaging/, installed in the virtual machine (run.sh) and nowhere else, because they change the host's units."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest

from jobrunner.server.devcerts import make_certs
from tests.vm.unit import CERTS, PACKAGING, UNITS, settings, systemctl


@pytest.fixture(scope="session")
def units() -> Iterator[None]:
    if os.environ.get("JOBRUNNER_IN_VM") != "1":
        pytest.fail("this changes the host's units: run it by make test-vm", pytrace=False)
    make_certs(CERTS, {"admin": "admin"})
    for unit in PACKAGING.glob("*.service"):
        shutil.copy(unit, UNITS)
    systemctl("daemon-reload")
    yield
    systemctl("stop", "jobrunnerd", "jobrunner-jobs")


@pytest.fixture
def running(units: None) -> None:
    """It runs on from test to test: a start takes long in an emulated machine."""
    settings()
    systemctl("start", "jobrunnerd")
