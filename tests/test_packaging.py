"""What stands around the package agrees with it: requirements, README, Makefile, citation, paper."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import escd
from escd import commands as command_line
from escd.paper import numbers

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RUNTIME = [Requirement(line) for line in PROJECT["dependencies"]]
DEVELOPMENT = [Requirement(line) for line in PROJECT["optional-dependencies"]["dev"]]
README = (ROOT / "README.md").read_text()
PAPER = (ROOT / "paper" / "main.tex").read_text()
SOURCES = sorted(
    path
    for pattern in (
        "escd/**/*.py",
        "tests/**/*.py",
        "benchmarks/**/*.py",
        "notebooks/*.ipynb",
        "figures/**/*.json*",
    )
    for path in ROOT.glob(pattern)
    if ".ipynb_checkpoints" not in path.parts
)


# --------------------------------------------------------------------------------
# requirements


def locked() -> dict[str, Requirement]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert len({canonicalize_name(each.name) for each in requirements}) == len(requirements), (
        "a package twice"
    )
    return {canonicalize_name(each.name): each for each in requirements}


def test_lock_is_exact():
    for requirement in locked().values():  # an address, a path or an option is no Requirement and fails above
        specifiers = list(requirement.specifier)
        assert [each.operator for each in specifiers] == ["=="], requirement
        assert requirement.url is None, requirement


@pytest.mark.parametrize("requirement", RUNTIME + DEVELOPMENT, ids=str)
def test_lock_satisfies_the_ranges(requirement):
    exact = locked()[canonicalize_name(requirement.name)]
    (version,) = (each.version for each in exact.specifier)
    assert requirement.specifier.contains(version)


@pytest.mark.parametrize("requirement", RUNTIME, ids=str)
def test_ranges_have_no_upper_end(requirement):
    # A machine with a newer torch, such as Colab's, must not be made to replace it.
    assert {each.operator for each in requirement.specifier} == {">="}


def test_lock_leaves_cuda_to_linux():
    linux_only = [name for name in locked() if name.startswith(("nvidia-", "cuda-")) or name == "triton"]
    assert linux_only
    mac = {"sys_platform": "darwin", "platform_machine": "arm64"}
    for name in linux_only:
        assert not locked()[name].marker.evaluate(mac), name


def test_environment_yml_agrees():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    assert conda == [f"python{PROJECT['requires-python']}", "pip"]
    *ranges, package = pip["pip"]
    assert sorted(ranges) == sorted(map(str, RUNTIME + DEVELOPMENT))
    assert package == "--editable ."


def third_party_imports() -> set[str]:
    """Top-level modules that escd imports, other than itself and the standard library."""
    found: set[str] = set()
    for path in ROOT.glob("escd/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"escd"}


def test_runtime_requirements_are_what_is_imported():
    distributions = importlib.metadata.packages_distributions()
    # what is not installed is called as it is imported
    imported = {canonicalize_name(distributions.get(name, [name])[0]) for name in third_party_imports()}
    optional = map(Requirement, PROJECT["optional-dependencies"]["8bit"])
    assert imported == {canonicalize_name(each.name) for each in (*RUNTIME, *optional)}


# --------------------------------------------------------------------------------
# the package


def test_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert escd.__version__ == citation["version"] == PROJECT["version"] == importlib.metadata.version("escd")


def test_licence_is_apache_2():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"


def test_wheel_holds_weights_and_data(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ROOT / "escd", source / "escd", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "--wheel-dir",
            tmp_path,
            source,
        ],
        check=True,
    )
    (wheel,) = tmp_path.glob("escd-*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        str(path.relative_to(ROOT))
        for path in ROOT.glob("escd/**/*")
        if path.is_file() and path.suffix not in (".pyc", ".md")
    }
    assert expected <= packed


def test_weights_are_small():
    files = [path for path in ROOT.glob("escd/weights/**/*") if path.is_file()]
    assert 0 < sum(path.stat().st_size for path in files) <= 40e6


def test_nothing_names_the_machine_it_was_made_on():
    # The pattern is put together, so that this file does not hold what it looks for.
    home = re.compile("/" + "(?:home|Users)/[A-Za-z]|/" + r"root/|[A-Z]:\\\\?Users\\")
    documents = [ROOT / name for name in ("README.md", "Makefile", "pyproject.toml", "requirements.lock")]
    for path in [
        *filter(lambda path: path.parent.name != "tests", SOURCES),
        *documents,
        *ROOT.glob("paper/*.tex"),
    ]:
        match = home.search(path.read_text())
        assert match is None, f"{path.relative_to(ROOT)}: {match.group()}"


# --------------------------------------------------------------------------------
# make and continuous integration


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_help_explains_every_target():
    make = shutil.which("make")
    text = subprocess.run([make, "-C", ROOT, "help"], capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"^make ([a-z]+) ", text, re.MULTILINE)) == make_targets() - {"help"}


def test_ci_entry_is_executable():
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def fake_python(folder: Path, script: str) -> dict[str, str]:
    """An environment whose only command is a `python3` that runs `script` of sh."""
    folder.mkdir()
    for command in ("sh", "cat", "rm"):
        (folder / command).symlink_to(shutil.which(command))
    python = folder / "python3"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    return {"PATH": str(folder)}


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("exit 1", ["No Python 3.11 or newer", "apt-get install python3 python3-venv", "brew install"]),
        (
            'case "$2" in *ensurepip*) exit 1;; *print*) echo python3.13-venv;; esac',
            [
                "python3 is there, but not its venv module",
                "sudo apt-get install python3-venv",
                "python3.13-venv",
            ],
        ),
    ],
    ids=["too old", "without venv"],
)
def test_install_names_the_remedy(tmp_path, script, said):
    # In a folder whose name holds a space, as a clone's may.
    environment = fake_python(tmp_path / "a folder", script)
    finder = subprocess.run(["sh", ROOT / ".ci" / "python"], env=environment, capture_output=True, text=True)
    assert finder.returncode == 1
    assert finder.stdout == ""
    for words in said:
        assert words in finder.stderr


def test_install_finds_this_python():
    finder = subprocess.run(
        ["sh", ROOT / ".ci" / "python"], env={"PYTHON": sys.executable}, capture_output=True, text=True
    )
    assert finder.stdout.strip() == sys.executable, finder.stderr


# --------------------------------------------------------------------------------
# README


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def readme_commands() -> list[list[str]]:
    lines = "\n".join(code_blocks("sh")).splitlines() + re.findall(r"`([^`\n]+)`", README)
    return [shlex.split(line, comments=True) for line in lines if line.startswith((".venv/bin/", "make "))]


def test_readme_commands_exist():
    commands = readme_commands()
    assert ["make", "figures"] in commands and ["make", "test"] in commands
    for command in commands:
        if command[0] == "make":
            assert command[1] in make_targets(), command
        else:
            assert command[:2] == [".venv/bin/python", "-m"], command
            assert importlib.util.find_spec(command[2]) is not None, command
            if command[2] == "escd":
                command_line._parser().parse_args(
                    command[3:]
                )  # leaves with an error where it does not know an option


def test_readme_api_exists():
    nodes = [node for block in code_blocks("python") for node in ast.walk(ast.parse(block))]
    assert nodes
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "escd":
            assert hasattr(escd, node.attr), node.attr


def test_readme_links_exist():
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert targets
    for target in targets:
        assert (ROOT / target).exists(), target


def test_readme_lists_the_notebooks():
    listed = re.findall(r"\]\(notebooks/([^)]+)\)", README)
    assert sorted(listed) == sorted(path.name for path in ROOT.glob("notebooks/*.ipynb"))


def test_readme_and_paper_hold_the_numbers_of_the_records(tmp_path):
    readme = Path(shutil.copy(ROOT / "README.md", tmp_path))
    macros = Path(shutil.copy(ROOT / "paper" / "numbers.tex", tmp_path))
    numbers.write_numbers(readme, macros)
    assert readme.read_text() == README
    assert macros.read_text() == (ROOT / "paper" / "numbers.tex").read_text()


# --------------------------------------------------------------------------------
# paper


def paper_numbers() -> set[str]:
    """Every key that the paper's text asks numbers.tex for."""
    body = PAPER.split(r"\begin{document}")[1]
    keys = set(re.findall(r"\\escdnum\{([^}]+)\}", body))
    for stem in re.findall(r"\\interval\{([^}]+)\}", body):
        keys |= {f"{stem}_low", f"{stem}_high"}
    return keys


def test_paper_numbers_are_defined():
    defined = re.findall(
        r"^\\escddef\{([^}]+)\}\{.+\}$", (ROOT / "paper" / "numbers.tex").read_text(), re.MULTILINE
    )
    assert len(set(defined)) == len(defined)
    assert paper_numbers() - set(defined) == set()


def test_paper_types_no_result():
    results = PAPER.split(r"\section{Results}")[1].split(r"\section{Limitations}")[0]
    assert re.findall(r"\d+(?:\.\d+|\s*\\,?\\%)", results) == []


def test_paper_figures_are_drawn():
    manifest = json.loads((ROOT / "figures" / "manifest.json").read_text())
    included = re.findall(r"\\includegraphics\{([^}]+)\}", PAPER)
    assert included
    for stem in included:
        assert stem in manifest
        assert (ROOT / "figures" / f"{stem}.pdf").exists()


def test_paper_cites_every_reference_and_no_other():
    entries = re.findall(r"^@\w+\{([^,]+),", (ROOT / "paper" / "refs.bib").read_text(), re.MULTILINE)
    cited = {
        key.strip() for group in re.findall(r"\\cite[tp]?\{([^}]+)\}", PAPER) for key in group.split(",")
    }
    assert len(set(entries)) == len(entries)
    assert set(entries) == cited


def test_paper_equations_come_in_the_order_the_code_names_them():
    labels = re.findall(r"\\label\{eq:(\w+)\}", PAPER)
    assert labels == ["dm", "ldm", "fdown", "ref", "fusion", "tuning", "strength", "rank"]
