"""README's examples, as they stand there, and the settings of the documents that it leads to; links lead somewhere."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from jobrunner.settings import load

pytestmark = pytest.mark.requires("root")

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
DOCUMENTS = "".join((ROOT / "docs" / f"{name}.md").read_text() for name in ("server", "jobs", "cli"))
STARTED = re.compile(r"Started job with ID: ([0-9a-f]{12})")


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def client_env(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, str]]:
    """The server of README's own commands, with another state directory and port; the environment of an admin's client."""
    where = tmp_path_factory.mktemp("readme")
    (where / "dev-certs").symlink_to(ROOT / "dev-certs")
    (script,) = blocks("sh")
    script = script.replace("sudo jobrunnerd", "exec jobrunnerd").replace("/var/lib/jobrunner", shlex.quote(str(where / "state")))
    environ = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with subprocess.Popen(
        ["bash", "-euc", script], cwd=where, env={**environ, "JOBRUNNERD_LISTEN": "127.0.0.1:0"}, stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stderr is not None
            said = []
            for line in server.stderr:
                said.append(line)
                if line.startswith("listening on "):
                    break
            else:
                pytest.fail(f"the server did not start: {''.join(said)}")
            yield {
                **environ,
                "JOBRUNNER_ADDRESS": line.removeprefix("listening on ").strip(),
                "JOBRUNNER_CA": str(where / "certs/ca.pem"),
                "JOBRUNNER_CERT": str(where / "certs/admin.pem"),
                "JOBRUNNER_KEY": str(where / "certs/admin.key"),
            }
        finally:
            server.terminate()


def run(command: list[str], environ: Mapping[str, str], cwd: Path) -> str:
    done = subprocess.run(command, env=environ, cwd=cwd, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_commands_print_what_readme_shows(client_env: Mapping[str, str], tmp_path: Path) -> None:
    (session,) = blocks("console")
    ids: dict[str, str] = {}
    for example in session.removeprefix("$ ").split("\n$ "):
        command, _, expected = example.partition("\n")
        for shown, real in ids.items():
            command = command.replace(shown, real)
        printed = run(["sh", "-c", command], client_env, tmp_path)
        if (shown_id := STARTED.match(expected)) and (real_id := STARTED.match(printed)):
            ids[shown_id[1]] = real_id[1]
            expected = expected.replace(shown_id[1], real_id[1])
        assert printed.strip() == expected.strip(), command


def test_the_sdk_example_reads_both_streams_and_the_exit_code(client_env: Mapping[str, str], tmp_path: Path) -> None:
    sdk, _ = blocks("python")
    printed = run([sys.executable, "-c", sdk], client_env, tmp_path).splitlines()
    assert sorted(printed[:-1]) == [r"stderr b'two\n'", r"stdout b'one\n'"]
    assert printed[-1] == "failed 3"


def test_the_library_example_runs_a_job_without_a_server(client_env: Mapping[str, str], tmp_path: Path) -> None:
    _, library = blocks("python")
    assert re.fullmatch(r"completed \d+\n", run([sys.executable, "-c", library], client_env, tmp_path))


def test_the_settings_examples_are_accepted(tmp_path: Path) -> None:
    given = {"state_dir": "state", "ca": "ca.pem", "cert": "server.pem", "key": "server.key"}
    examples = []
    for block in blocks("toml", DOCUMENTS):
        file = tmp_path / "jobrunner.toml"
        file.write_text(block)
        examples.append(load(file, {}, given))
    settings, offering, users = examples
    assert (set(offering.runner.offers.volumes), set(offering.runner.offers.roots)) == ({"sources", "cache"}, {"alpine"})
    assert set(users.runner.offers.users) == {"ci", "release"}
    assert (settings.listen, settings.viewer_output) == ("0.0.0.0:7443", False)
    assert (settings.runner.defaults.memory, settings.runner.ceilings.memory) == (512 << 20, 8 << 30)


def test_every_command_that_readme_names_is_there(client_env: Mapping[str, str], tmp_path: Path) -> None:
    named = set(re.findall(r"`jobrunner ([a-z]+)", README + DOCUMENTS)) | {"run", "wait", "info", "rm"}
    help_text = run(["jobrunner", "--help"], client_env, tmp_path)
    assert {name for name in named if not re.search(rf"^\s+{name}\s", help_text, re.MULTILINE)} == set()


def anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")], ids=lambda path: path.stem)
def test_every_link_leads_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if not link.startswith(("https://", "http://")):
            name, _, anchor = link.partition("#")
            target = path.parent / name if name else path
            assert target.exists(), link
            assert not anchor or anchor in anchors(target.read_text()), link
