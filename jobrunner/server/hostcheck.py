"""`jobrunnerd check`: what the host lacks, what the certificates lack, and in the end jobs that are really run."""

from __future__ import annotations

import os
from pathlib import Path

from jobrunner import trial
from jobrunner.errors import ConfigError, JobRunnerError
from jobrunner.linux.check import everything
from jobrunner.linux.finding import Finding, Level
from jobrunner.sandbox import needs
from jobrunner.server.trust import Trust
from jobrunner.settings import load, load_runner

__all__ = ["findings"]


def findings(config: Path | None, state_dir: str | None) -> list[Finding]:
    """All of them, the host's first. Raises ConfigError for settings that cannot be read; whatever else there is, is a finding."""
    runner = load_runner(config, os.environ, {"state_dir": state_dir})
    found = everything(needs(runner))
    if any(finding.level is Level.MISSING for finding in found):
        found.append(Finding(Level.LIMITED, "job", "none was tried, because something is missing", "mend that, then check again"))
    else:
        found += trial.run(runner)
    return found + _of_certificates(config, state_dir)


def _of_certificates(config: Path | None, state_dir: str | None) -> list[Finding]:
    """Of those that the settings name; nothing where they name none."""
    try:
        settings = load(config, os.environ, {"state_dir": state_dir})
    except ConfigError:
        return []
    try:
        trust = Trust(settings)
    except JobRunnerError as exc:
        return [Finding(Level.MISSING, "certificates", exc.message, "`jobrunner certs` makes them: docs/certificates.md")]
    remedy = "`jobrunner certs renew`, and bring the files here"
    told = [Finding(Level.LIMITED, "certificates", text, remedy) for text in trust.warnings()]
    return told or [Finding(Level.OK, "certificates", "they hold, the revocation list too" if settings.crl else "they hold")]
