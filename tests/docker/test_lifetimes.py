"""What becomes of jobs when the container is stopped, killed, started again, and taken away."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.docker.stack import Cli, Stack

STUBBORN = "trap '' TERM; echo up; while :; do sleep 0.1; done"
POLITE = "trap 'echo goodbye; exit 0' TERM; echo up; while :; do sleep 0.1; done"


@pytest.fixture(autouse=True)
def _serving(stack: Stack) -> Iterator[None]:
    """A server that serves again afterwards, whatever the test did to it."""
    yield
    if not stack.inspect(stack.container())["State"]["Running"]:
        serve_again(stack)


def serve_again(stack: Stack) -> None:
    stack.compose("start", "jobrunnerd")
    stack.wait_until_it_listens(stack.container())


def start_and_see_it_up(cli: Cli, script: str) -> str:
    job_id = cli.start("--grace", "60s", "--", "sh", "-c", script)
    with cli.follow(job_id) as output:
        assert output.stdout is not None
        assert output.stdout.readline() == "up\n"
        output.terminate()
    return job_id


def test_docker_stop_is_a_clean_shutdown_within_docker_s_ten_seconds(stack: Stack, cli: Cli) -> None:
    polite, stubborn = (start_and_see_it_up(cli, script) for script in (POLITE, STUBBORN))
    stack.docker("stop", stack.container())
    assert stack.inspect(stack.container())["State"]["ExitCode"] == 0, "137 is docker's kill after ten seconds"
    serve_again(stack)
    told = [cli.info(job_id) for job_id in (polite, stubborn)]
    assert [(job["status"], job["end_reason"], job["stopped_by"]) for job in told] == [("terminated", "shutdown", "jobrunnerd")] * 2
    assert (told[0]["exit_code"], told[1]["signal"]) == (0, 9)
    assert cli("log", polite).out == "up\ngoodbye\n"


def test_who_follows_a_job_sees_its_end_when_the_container_is_stopped(stack: Stack, cli: Cli) -> None:
    with cli.follow(cli.start("--", "sh", "-c", POLITE)) as output:
        assert output.stdout is not None
        assert output.stdout.readline() == "up\n"
        stack.compose("stop", "jobrunnerd")
        assert output.stdout.read() == "goodbye\n"
        assert output.wait() == 0


def test_after_docker_kill_jobs_are_told_as_lost_with_their_output(stack: Stack, cli: Cli) -> None:
    job_id = start_and_see_it_up(cli, STUBBORN)
    stack.docker("kill", stack.container())
    stack.docker("wait", stack.container())  # a start before the end would be none
    serve_again(stack)
    job = cli.info(job_id)
    assert (job["status"], job["end_reason"]) == ("failed", "lost")
    assert cli("log", job_id).out == "up\n"


def test_ended_jobs_and_their_output_outlive_a_new_container(stack: Stack, cli: Cli) -> None:
    job_id = cli.start("echo", "kept")
    cli("wait", job_id)
    before = stack.container()
    stack.compose("up", "-d", "--no-build", "--force-recreate", "--no-deps", "jobrunnerd")
    stack.wait_until_it_listens(stack.container())
    assert stack.container() != before
    assert (cli("status", job_id).out, cli("log", job_id).out) == ("completed\n", "kept\n")
