"""The recipes of container images: linted, and what they name is there. Nothing is built here."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from dockerfile_parse import DockerfileParser
from helpers import ROOT
from packaging.requirements import Requirement
from spython.main.parse.parsers import SingularityParser

DOCKERFILE = ROOT / "containers" / "Dockerfile"
DEFINITION = ROOT / "containers" / "stretto.def"


@pytest.fixture(scope="module")
def steps():
    """Instructions of the Dockerfile with their values, in order."""
    parser = DockerfileParser(fileobj=DOCKERFILE.open("rb"))
    return [(step["instruction"], step["value"]) for step in parser.structure if step["instruction"] != "COMMENT"]


@pytest.fixture(scope="module")
def definition():
    (layer,) = SingularityParser(str(DEFINITION)).recipe.values()
    return layer


def values(steps, instruction):
    return [value for name, value in steps if name == instruction]


def test_the_dockerfile_passes_the_linter():
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, str(DOCKERFILE)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_base_is_pinned_to_the_cuda_of_the_pinned_pytorch(steps, definition):
    (base,) = values(steps, "FROM")
    assert definition.fromHeader == base
    image, _, tag = base.partition(":")
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert image == "nvidia/cuda"
    assert tag.split("-")[0] == pins["cuda-toolkit"]


def test_everything_that_is_copied_is_in_the_repository_and_reaches_the_build(steps):
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert ignored[0] == "*"
    kept = {line[1:] for line in ignored if line.startswith("!")}
    copied = {source for value in values(steps, "COPY") for source in shlex.split(value)[:-1]}
    assert copied == kept
    assert all((ROOT / source).exists() for source in copied)


def test_both_images_hold_the_same(steps, definition):
    copied = {source for value in values(steps, "COPY") for source in shlex.split(value)[:-1]}
    files = dict(line.split() for line in definition.files)
    assert set(files) == copied
    assert all(place == f"/opt/source/{source}" for source, place in files.items())
    docker, apptainer = " ".join(values(steps, "RUN")), " ".join(definition.install)
    # Apptainer has an init of its own.
    assert packages(docker) - packages(apptainer) == {"tini"}
    assert not packages(apptainer) - packages(docker)
    packaged = yaml.safe_load(re.search(r"include = (\[.*\])", (ROOT / "pyproject.toml").read_text())[1])
    assert {name.rstrip("*") for name in packaged} <= copied


def packages(script: str) -> set[str]:
    """What apt installs."""
    listed = re.search(r"--no-install-recommends([^&]*?)(?:&&|rm )", script.replace("\\", " "))
    return set(listed[1].split())


def test_python_packages_have_the_pinned_versions(steps, definition):
    for script in (" ".join(values(steps, "RUN")), "\n".join(definition.install).replace("\\\n", " ")):
        installs = re.findall(r"pip install [^&;\n]*", script)
        assert installs
        assert all("-c constraints.txt" in command for command in installs), installs
        assert "pip check" in script
    assert "liger-kernel" in {Requirement(line).name for line in extra("cuda")}


def extra(name: str) -> list[str]:
    text = (ROOT / "pyproject.toml").read_text()
    return re.findall(r'^    "(.*?)"', re.search(rf"(?ms)^{name} = \[$(.*?)^\]", text)[1], re.MULTILINE)


def test_flash_attn_is_left_out_unless_it_is_asked_for(steps, definition):
    assert 'FLASH_ATTN=""' in values(steps, "ARG")
    assert "flash_attn=none" in DEFINITION.read_text()
    assert 'if [ "{{ flash_attn }}" != "none" ]; then' in definition.install


def test_stages_do_not_run_as_root_and_are_told_to_stop(steps):
    (user,) = values(steps, "USER")
    assert int(user) > 0
    order = [name for name, _ in steps]
    assert order.index("USER") > max(place for place, name in enumerate(order) if name in ("RUN", "COPY"))
    assert values(steps, "ENTRYPOINT") == ['["tini", "--"]']
    assert values(steps, "CMD") == ['["stretto", "--help"]']
    assert "openssh-server" not in DOCKERFILE.read_text()


def test_the_scripts_of_the_definition_file_are_shell(definition):
    script = "\n".join(definition.install)
    assert subprocess.run(["sh", "-n"], input=script, text=True, timeout=30).returncode == 0
    assert definition.cmd == 'exec stretto "$@"'
    assert "PATH=/opt/stretto/bin:$PATH" in definition.environ
