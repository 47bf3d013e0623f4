"""docker-compose.yml as it stands: from nothing to a job that has ended, and who can see which key."""

from __future__ import annotations

import re

from tests.docker.stack import Cli, Stack


def test_the_client_runs_its_job_and_shows_its_output(stack: Stack) -> None:
    done = stack.compose("run", "--rm", "-T", "client")
    assert re.fullmatch(r"process \d+ on build\n", done.out)


def test_the_client_exits_with_the_code_of_its_job(stack: Stack) -> None:
    assert stack.compose("run", "--rm", "-T", "client", "run", "--", "sh", "-c", "exit 7", check=False).code == 7


def test_the_server_is_healthy_by_its_own_grpc_health_service(stack: Stack) -> None:
    health = stack.inspect(stack.container())["State"]["Health"]
    assert (health["Status"], health["Log"][-1]["Output"]) == ("healthy", "SERVING\n")


def test_the_health_check_says_in_one_line_why_a_server_is_not_healthy(stack: Stack) -> None:
    said = stack.inside("JOBRUNNERD_LISTEN=0.0.0.0:1 python3 /opt/jobrunner/bin/health.py 2>&1 || echo $?")
    assert re.fullmatch(r"cannot check health: .*Connect call failed \('127\.0\.0\.1', 1\)\n1\n", said)


def test_the_server_has_the_capabilities_that_compose_gives_and_no_more(stack: Stack) -> None:
    given = sum(1 << number for number in (21, 12, 7, 6, 8, 5, 0, 1, 3, 18))  # capabilities(7), in the file's order
    effective, bounding = re.findall(r"Cap(?:Eff|Bnd):\t([0-9a-f]+)", stack.inside("cat /proc/1/status"))
    assert (int(effective, 16), int(bounding, 16)) == (given,) * 2


def test_no_key_but_its_own_is_in_the_server_s_container(stack: Stack) -> None:
    assert stack.inside("find / -xdev -name '*.key'; find /certs /var/lib/jobrunner -name '*.key'").split() == [
        "/certs/health.key",
        "/certs/server.key",
    ]


def test_certificates_are_made_once(stack: Stack, cli: Cli) -> None:
    before = stack.inside("cat /certs/ca.pem /certs/server.pem")
    assert "certificates are there already" in stack.compose("run", "--rm", "-T", "init-certs").out
    assert stack.inside("cat /certs/ca.pem /certs/server.pem") == before


def test_the_check_finds_nothing_missing(stack: Stack) -> None:
    found = stack.inside("jobrunnerd check")
    assert re.findall("^missing.*", found, re.MULTILINE) == []
    assert "a container's PID namespace" in found


def test_a_viewer_s_certificate_does_not_start_jobs(stack: Stack) -> None:
    files = ("--cert", "/certs/viewer.pem", "--key", "/certs/viewer.key")
    assert stack.compose("run", "--rm", "-T", "client", *files, "start", "true", check=False).code == 77
    assert stack.compose("run", "--rm", "-T", "client", *files, "ls").out.startswith("ID ")
