"""Who may call what. One table over every RPC; what is not in it is denied.

The role is the organizational unit (OU) of the client certificate's own subject: there must be exactly one, spelled exactly as a
role is. The user is its common name (CN), again exactly one. All of it is checked before a handler or a message is looked at, in
the same way for unary and streaming calls, so that a denial tells nothing about jobs.
"""

from __future__ import annotations

import enum
import logging
import ssl
import time
from collections.abc import Collection, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from jobrunner.errors import AccessError, PermissionDenied, Unauthenticated

__all__ = ["Identity", "Role", "authorize", "check_complete", "current_identity", "identify", "policy", "who"]

logger = logging.getLogger(__name__)


class Role(enum.StrEnum):
    """The roles of the original design."""

    ADMIN = "admin"
    VIEWER = "viewer"


@dataclass(frozen=True, slots=True)
class Identity:
    """Who calls: from the certificate alone."""

    user: str
    role: Role


MAX_NAME = 64
"""Characters of a common name: RFC 5280, ub-common-name. It is shown to others, also at their terminals."""
EVERYONE = frozenset(Role)
ADMINS = frozenset({Role.ADMIN})

POLICY: Mapping[str, frozenset[Role]] = {
    "/jobrunner.v1.JobService/Start": ADMINS,
    "/jobrunner.v1.JobService/Stop": ADMINS,
    "/jobrunner.v1.JobService/QueryStatus": EVERYONE,
    "/jobrunner.v1.JobService/SubscribeOutput": EVERYONE,
    "/jobrunner.v1.JobService/Wait": EVERYONE,
    "/jobrunner.v1.JobService/List": EVERYONE,
    "/jobrunner.v1.JobService/Watch": EVERYONE,
    "/jobrunner.v1.JobService/Remove": ADMINS,
    "/jobrunner.v1.JobService/WriteInput": ADMINS,
    "/jobrunner.v1.JobService/GetServer": EVERYONE,
    "/jobrunner.v1.JobService/ListWorkspaces": ADMINS,
    "/jobrunner.v1.JobService/RemoveWorkspace": ADMINS,
    # The original design's text has no package.
    "/JobService/Start": ADMINS,
    "/JobService/Stop": ADMINS,
    "/JobService/QueryStatus": EVERYONE,
    "/JobService/SubscribeOutput": EVERYONE,
    "/grpc.health.v1.Health/Check": EVERYONE,
    "/grpc.health.v1.Health/Watch": EVERYONE,
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo": EVERYONE,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": EVERYONE,
}
OUTPUT = ("/jobrunner.v1.JobService/SubscribeOutput", "/JobService/SubscribeOutput")

_identity: ContextVar[Identity] = ContextVar("identity")


def policy(viewer_output: bool) -> Mapping[str, frozenset[Role]]:
    """The table, with or without output for viewers."""
    return POLICY if viewer_output else {**POLICY, **dict.fromkeys(OUTPUT, ADMINS)}


def check_complete(methods: Collection[str]) -> None:
    """Raises AssertionError unless the table has each of these methods and no other: a server without it does not start."""
    if set(methods) != set(POLICY):
        raise AssertionError(f"RPCs and their policy differ: {sorted(set(methods) ^ set(POLICY))}")


def current_identity() -> Identity:
    """Who makes the call that this task handles; LookupError outside of one."""
    return _identity.get()


def identify(certificate: Mapping[str, Any] | None, now: float) -> Identity:
    """Who a certificate, as `ssl.SSLSocket.getpeercert` gives it, stands for. Raises AccessError that says what is wrong with it.

    A connection may outlive its certificate, so `now` (seconds since the epoch) counts for every call.
    """
    if not certificate:
        raise Unauthenticated("there is no client certificate")
    if ssl.cert_time_to_seconds(certificate["notAfter"]) < now:
        raise Unauthenticated("the client certificate has expired")
    units = _attributes(certificate, "organizationalUnitName")
    if len(units) != 1:
        raise PermissionDenied(f"the client certificate has {len(units)} organizational units (OU), one is the role")
    if units[0] not in list(Role):
        raise PermissionDenied(f'the client certificate\'s organizational unit (OU), "{units[0]}", is no role')
    names = _attributes(certificate, "commonName")
    if len(names) != 1 or not names[0]:
        raise PermissionDenied(f"the client certificate has {len(names)} common names (CN), one is the user")
    if len(names[0]) > MAX_NAME or not names[0].isprintable():
        raise PermissionDenied(f"the client certificate's common name (CN) is not up to {MAX_NAME} characters that can be printed")
    return Identity(names[0], Role(units[0]))


def authorize(method: str, certificate: Mapping[str, Any] | None, table: Mapping[str, frozenset[Role]], address: str) -> Identity:
    """Let this call through, with its identity for the handler, or raise AccessError; denials are logged."""
    call = method.rpartition("/")[2]
    try:
        identity = identify(certificate, time.time())
        if identity.role not in table.get(method, ()):
            raise PermissionDenied(f"the role {identity.role} does not allow it")
    except AccessError as exc:
        logger.warning("denied %s to %s at %s: %s", method, _subject(certificate), address, exc.message)
        raise type(exc)(f"cannot call {call}: {exc.message}") from exc
    _identity.set(identity)
    return identity


def who(certificate: Mapping[str, Any] | None, address: str) -> dict[str, str]:
    """The caller for the audit log, acceptable or not."""
    known = certificate or {}
    user, role = (",".join(_attributes(known, name)) for name in ("commonName", "organizationalUnitName"))
    # As `jobrunner certs show` has it, and `revoke` takes it.
    serial = f"{int(known['serialNumber'], 16):x}" if "serialNumber" in known else ""
    return {"address": address, "user": user, "role": role, "serial": serial}


def _attributes(certificate: Mapping[str, Any], name: str) -> list[str]:
    """All values of one attribute of the subject; a name may have several, also within one RDN."""
    return [value for rdn in certificate.get("subject", ()) for key, value in rdn if key == name]


def _subject(certificate: Mapping[str, Any] | None) -> str:
    names = _attributes(certificate or {}, "commonName")
    return repr(names[0]) if len(names) == 1 else "an unknown user"
