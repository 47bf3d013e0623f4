"""Every RPC x every kind of certificate, against a table written by hand."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Callable
from pathlib import Path

import anyio
import grpc
import grpc.aio
import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID

from jobrunner.errors import PermissionDenied, Unauthenticated
from jobrunner.server import auth
from jobrunner.wire import descriptors
from tests.support.certs import CertificateAuthority, Pair
from tests.support.protobuf import official
from tests.support.server import GRPC_ERROR, Running, invoke, official_channel, serving

pytestmark = pytest.mark.requires("root")

# What an empty request is answered with: OK, or the status with which the service, having been reached, refuses it.
TABLE = {
    # RPC                                                          admin               viewer
    "/jobrunner.v1.JobService/Start":                             ("INVALID_ARGUMENT", "PERMISSION_DENIED"),
    "/jobrunner.v1.JobService/Stop":                              ("OK",               "PERMISSION_DENIED"),
    "/jobrunner.v1.JobService/QueryStatus":                       ("NOT_FOUND",        "NOT_FOUND"),
    "/jobrunner.v1.JobService/SubscribeOutput":                   ("NOT_FOUND",        "NOT_FOUND"),
    "/jobrunner.v1.JobService/Wait":                              ("NOT_FOUND",        "NOT_FOUND"),
    "/jobrunner.v1.JobService/List":                              ("OK",               "OK"),
    "/jobrunner.v1.JobService/Watch":                             ("UNIMPLEMENTED",    "UNIMPLEMENTED"),
    "/jobrunner.v1.JobService/Remove":                            ("NOT_FOUND",        "PERMISSION_DENIED"),
    "/jobrunner.v1.JobService/WriteInput":                        ("UNIMPLEMENTED",    "PERMISSION_DENIED"),
    "/jobrunner.v1.JobService/GetServer":                         ("OK",               "OK"),
    "/jobrunner.v1.JobService/ListWorkspaces":                    ("OK",               "PERMISSION_DENIED"),
    "/jobrunner.v1.JobService/RemoveWorkspace":                   ("INVALID_ARGUMENT", "PERMISSION_DENIED"),
    "/JobService/Start":                                          ("INVALID_ARGUMENT", "PERMISSION_DENIED"),
    "/JobService/Stop":                                           ("OK",               "PERMISSION_DENIED"),
    "/JobService/QueryStatus":                                    ("NOT_FOUND",        "NOT_FOUND"),
    "/JobService/SubscribeOutput":                                ("NOT_FOUND",        "NOT_FOUND"),
    "/grpc.health.v1.Health/Check":                               ("OK",               "OK"),
    "/grpc.health.v1.Health/Watch":                               ("OK",               "OK"),
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo":  ("OK",               "OK"),
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": ("OK",           "OK"),
}  # fmt: skip
AS_ADMIN = {rpc: row[0] for rpc, row in TABLE.items()}
AS_VIEWER = {rpc: row[1] for rpc, row in TABLE.items()}
DENIED = dict.fromkeys(TABLE, "PERMISSION_DENIED")
REFUSED = dict.fromkeys(TABLE, "UNAVAILABLE")  # the connection is lost in TLS: no RPC is answered at all

CLIENT = ExtendedKeyUsageOID.CLIENT_AUTH
SERVER = ExtendedKeyUsageOID.SERVER_AUTH


def certificate(authority: CertificateAuthority, kind: str) -> Pair | None:
    stranger = CertificateAuthority(authority.directory / "stranger")
    make: dict[str, Callable[[], Pair | None]] = {
        "admin": lambda: authority.issue("c", ["admin"]),
        "viewer": lambda: authority.issue("c", ["viewer"]),
        "admin for server and client use": lambda: authority.issue("c", ["admin"], usages=(CLIENT, SERVER)),
        "no certificate": lambda: None,
        "stranger's CA": lambda: stranger.issue("c", ["admin"]),
        "expired": lambda: authority.issue("c", ["admin"], expired=True),
        "server use only": lambda: authority.issue("c", ["admin"], usages=(SERVER,)),
        "the server's own": lambda: Pair(authority.directory / "server.pem", authority.directory / "server.key"),
        "no OU": lambda: authority.issue("c", []),
        "two OUs": lambda: authority.issue("c", ["admin", "viewer"]),
        "two OUs in one RDN": lambda: authority.issue("c", ["admin", "viewer"], multi_valued=True),
        "admin twice": lambda: authority.issue("c", ["admin", "admin"]),
        "unknown OU": lambda: authority.issue("c", ["operator"]),
        "Admin": lambda: authority.issue("c", ["Admin"]),
        "admin and a space": lambda: authority.issue("c", ["admin "]),
        "admin in the CN": lambda: authority.issue("c", ["x"], users=["admin"]),
        "no CN": lambda: authority.issue("c", ["admin"], users=[]),
        "two CNs": lambda: authority.issue("c", ["admin"], users=["a", "b"]),
    }
    return make[kind]()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("admin", AS_ADMIN),
        ("viewer", AS_VIEWER),
        ("admin for server and client use", AS_ADMIN),
        ("no certificate", REFUSED),
        ("stranger's CA", REFUSED),
        ("expired", REFUSED),
        ("server use only", REFUSED),
        ("the server's own", REFUSED),
        ("no OU", DENIED),
        ("two OUs", DENIED),
        ("two OUs in one RDN", DENIED),
        ("admin twice", DENIED),
        ("unknown OU", DENIED),
        ("Admin", DENIED),
        ("admin and a space", DENIED),
        ("admin in the CN", DENIED),
        ("no CN", DENIED),
        ("two CNs", DENIED),
    ],
)
async def test_every_rpc_answers_this_certificate_as_the_table_says(tmp_path: Path, kind: str, expected: dict[str, str]) -> None:
    async with serving(tmp_path) as running:
        pair = certificate(running.authority, kind)
        assert await answers(running, pair) == expected


async def test_without_viewer_output_only_admins_read_it(tmp_path: Path) -> None:
    async with serving(tmp_path, viewer_output=False) as running:
        withheld = {rpc: "PERMISSION_DENIED" for rpc in TABLE if rpc.endswith("/SubscribeOutput")}
        assert await answers(running, running.pair("viewer", "viewer")) == AS_VIEWER | withheld
        assert await answers(running, running.pair("admin", "admin")) == AS_ADMIN


def test_the_table_of_the_test_has_every_rpc_of_the_descriptors() -> None:
    methods = {symbol for symbol in descriptors.load().symbols if symbol.rpartition(".")[0] in descriptors.load().services}
    packaged = {f"/{service}/{name}" for service, _, name in (method.rpartition(".") for method in methods)}
    aliases = {rpc for rpc in TABLE if rpc.startswith(("/JobService/", "/grpc.reflection.v1alpha."))}
    assert packaged == set(TABLE) - aliases


def test_a_server_with_an_rpc_that_the_policy_does_not_know_does_not_start() -> None:
    with pytest.raises(AssertionError, match="/jobrunner.v1.JobService/Reboot"):
        auth.check_complete([*TABLE, "/jobrunner.v1.JobService/Reboot"])


async def test_a_denial_is_logged_with_who_and_what(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(tmp_path) as running:
        with caplog.at_level(logging.WARNING, "jobrunner"):
            pair = running.authority.issue("mallory", ["viewer"])
            assert await answer(running, pair, "/jobrunner.v1.JobService/Stop") == "PERMISSION_DENIED"
    assert [record.getMessage().split(" at ")[0] for record in caplog.records] == [
        "denied /jobrunner.v1.JobService/Stop to 'mallory'"
    ]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("no certificate", "peer did not return a certificate"),
        ("expired", "certificate has expired"),
        ("server use only", "unsuitable certificate purpose"),
        ("stranger's CA", "unable to get local issuer certificate"),
    ],
)
async def test_a_refused_handshake_is_logged_with_its_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, reason: str
) -> None:
    async with serving(tmp_path) as running:
        with caplog.at_level(logging.WARNING, "jobrunner"):
            await answer(running, certificate(running.authority, kind), "/jobrunner.v1.JobService/List")
    told = [record.getMessage() for record in caplog.records]
    assert told
    assert all(text.startswith("TLS handshake with 127.0.0.1:") and text.endswith(f" failed: {reason}") for text in told)


def test_a_certificate_that_has_expired_on_an_open_connection_is_refused() -> None:
    subject = ((("organizationalUnitName", "admin"),), (("commonName", "eve"),))
    peer = {"subject": subject, "notAfter": "Jan  1 00:00:00 2030 GMT", "serialNumber": "01"}
    moment = datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC).timestamp()
    assert auth.identify(peer, moment - 1).user == "eve"
    with pytest.raises(Unauthenticated, match="has expired"):
        auth.identify(peer, moment + 1)


def test_a_connection_without_a_certificate_is_nobody() -> None:
    with pytest.raises(Unauthenticated):
        auth.identify({}, 0)


def test_a_method_without_a_rule_is_denied() -> None:
    subject = ((("organizationalUnitName", "admin"),), (("commonName", "eve"),))
    peer = {"subject": subject, "notAfter": "Jan  1 00:00:00 2130 GMT", "serialNumber": "01"}
    with pytest.raises(PermissionDenied, match="cannot call Reboot: the role admin does not allow it"):
        auth.authorize("/jobrunner.v1.JobService/Reboot", peer, auth.policy(viewer_output=True), "127.0.0.1:1")


async def answers(running: Running, pair: Pair | None) -> dict[str, str]:
    async with official_channel(running.address, running.authority.pem, pair) as channel:
        with anyio.fail_after(20):
            return {rpc: await _answer(channel, rpc) for rpc in TABLE}


async def answer(running: Running, pair: Pair | None, rpc: str) -> str:
    async with official_channel(running.address, running.authority.pem, pair) as channel:
        with anyio.fail_after(20):
            return await _answer(channel, rpc)


async def _answer(channel: grpc.aio.Channel, rpc: str) -> str:
    """The status of a call with one empty message, OK as soon as it is answered by one."""
    question = official()["grpc.reflection.v1.ServerReflectionRequest"](list_services="").SerializeToString()
    first = question if "Reflection" in rpc else b""
    # On the wire a call with one message looks the same whatever its kind is.
    call = invoke(channel, rpc, "", "unary_stream")(first)
    try:
        if await call.read() is grpc.aio.EOF:
            return str((await call.code()).name)
    except GRPC_ERROR as exc:
        return str(exc.code().name)
    call.cancel()
    return "OK"


@pytest.mark.parametrize("name", ["eve\n2026-01-01 INFO all is well", "\x1b[2Jeve", "admin\0x", "\u202eeve", "x" * 65])
def test_a_name_that_cannot_be_shown_is_no_user(name: str) -> None:
    subject = ((("organizationalUnitName", "admin"),), (("commonName", name),))
    peer = {"subject": subject, "notAfter": "Jan  1 00:00:00 2050 GMT", "serialNumber": "1"}
    with pytest.raises(PermissionDenied, match="characters that can be printed"):
        auth.identify(peer, 0)
