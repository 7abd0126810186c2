"""The lock: one exact version of every package that pyproject.toml asks for, and nothing that only one machine has."""

from __future__ import annotations

import re
import subprocess
import tomllib
from itertools import product
from pathlib import Path

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
LOCK, CUDA = (ROOT / name for name in ("requirements.lock", "requirements-cuda.lock"))
MACHINES = [
    {
        **default_environment(),
        "python_version": python,
        "python_full_version": f"{python}.1",
        "sys_platform": system.lower(),
        "platform_system": system,
        "platform_machine": machine,
        "os_name": "posix",
    }
    for python, (system, machine) in product(
        ("3.11", "3.12", "3.13"), (("Linux", "x86_64"), ("Linux", "aarch64"), ("Darwin", "arm64"))
    )
]


def wanted():
    """What pyproject.toml asks for, with all extras and what builds packages, but for torch."""
    read = tomllib.loads((ROOT / "pyproject.toml").read_text())
    groups = [read["project"]["dependencies"], read["build-system"]["requires"]]
    groups += [*read["project"]["optional-dependencies"].values(), *read["dependency-groups"].values()]
    asked = [Requirement(text) for group in groups for text in group]
    assert "torch" in {requirement.name for requirement in asked}
    return sorted({requirement for requirement in asked if requirement.name != "torch"}, key=str)


def entries(path):
    """Requirement and hashes of each package in a lock."""
    text = re.sub(r"^#.*\n", "", path.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    for line in text.splitlines():
        requirement, *hashes = line.split("--hash=")
        yield Requirement(requirement), [found.strip() for found in hashes]


def variable(name):
    """A variable's value in the Makefile."""
    makefile = f"include Makefile\nshow:\n\t@echo '$({name})'\n"
    command = ["make", "-s", "--no-print-directory", "-f", "-", "show"]
    return subprocess.run(command, cwd=ROOT, input=makefile, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("requirement", wanted(), ids=str)
def test_what_is_asked_for_has_one_version_in_the_lock(requirement):
    name = canonicalize_name(requirement.name)
    found = [entry for entry in entries(LOCK) if entry[0].name == name]
    assert len(found) == 1
    [(locked, hashes)] = found
    assert hashes
    [pin] = locked.specifier
    assert requirement.specifier.contains(pin.version)
    for machine in MACHINES:
        if requirement.marker is None or requirement.marker.evaluate(machine):
            assert locked.marker is None or locked.marker.evaluate(machine), machine


def test_every_version_is_exact_and_every_file_has_a_hash():
    locked = list(entries(LOCK))
    assert len({requirement.name for requirement, _ in locked}) == len(locked) > 100
    assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", found) for _, hashes in locked for found in hashes)
    assert all(hashes for _, hashes in locked)
    for requirement, _ in [*locked, *entries(CUDA)]:
        assert re.fullmatch(r"==[\w.]+", str(requirement.specifier)), requirement


@pytest.mark.parametrize("path", [LOCK, CUDA], ids=lambda path: path.name)
def test_locks_name_no_host_and_no_folder(path):
    text = path.read_text()
    assert not re.search(r"/|@|--(?!hash=)|\.(com|io|net|org)\b", text)


def test_torch_and_what_its_cuda_build_needs_are_apart():
    apart = re.compile(r"torch$|nvidia-|cuda-")
    assert not [requirement.name for requirement, _ in entries(LOCK) if apart.match(requirement.name)]
    assert all(apart.match(requirement.name) for requirement, _ in entries(CUDA))


def test_makefile_and_action_name_exact_versions_and_the_ends_of_the_range():
    read = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    ranges = {requirement.name: requirement.specifier for requirement in map(Requirement, read)}
    [torch] = Requirement(variable("LOCKED_TORCH")).specifier
    assert torch.operator == "=="
    action = yaml.safe_load((ROOT / "action.yml").read_text())
    assert action["inputs"]["torch"]["default"] == variable("LOCKED_TORCH")
    assert ranges["torch"].contains(torch.version)
    assert Requirement(variable("TRANSFORMERS_newest")).specifier == ranges["transformers"]
    [oldest] = Requirement(variable("TRANSFORMERS_oldest")).specifier
    [lowest] = [bound for bound in ranges["transformers"] if bound.operator == ">="]
    assert oldest.operator == "=="
    assert oldest.version in (lowest.version, f"{lowest.version}.0")


def test_tests_that_touch_transformers_are_there():
    named = variable("TRANSFORMERS_TESTS").split()
    assert {"tests/test_engine.py", "tests/test_real_model.py"} <= set(named)
