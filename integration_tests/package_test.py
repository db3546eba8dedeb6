"""What a release holds: the sdist the repository, the wheel the package; `make release-check`."""

import re
import subprocess
import sys
import tarfile
from email import message_from_bytes
from pathlib import Path
from zipfile import ZipFile

import pytest

pytestmark = pytest.mark.long

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "nflows_mongeampere"
TESTS = re.compile(r"(_test|conftest)\.py$")


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """An sdist, and the wheel that is made from it."""
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def metadata(release):
    with ZipFile(release[1]) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return message_from_bytes(archive.read(name))


def test_the_index_would_take_both(release):
    check = [sys.executable, "-m", "twine", "check", "--strict", *release]
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_wheel_holds_the_package_without_tests_and_examples(release):
    with ZipFile(release[1]) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    files = {file.relative_to(ROOT) for file in PACKAGE.rglob("*.py")}
    expected = {file.as_posix() for file in files if "examples" not in file.parts}
    expected = {file for file in expected if not TESTS.search(file)}
    assert names == {*expected, "nflows_mongeampere/py.typed"}
    assert "nflows_mongeampere/potentials/ridge.py" in names


def test_the_sdist_holds_tests_examples_and_documentation(release):
    with tarfile.open(release[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("nflows_mongeampere", "integration_tests", "examples", "docs"):
        files = [f for f in (ROOT / folder).rglob("*") if f.suffix in {".py", ".md"}]
        assert files
        assert {file.relative_to(ROOT).as_posix() for file in files} <= names
    assert {"LICENSE", "README.md", "CHANGELOG.md", "Makefile", "conftest.py"} <= names


def test_links_of_the_index_page_name_files_of_the_repository(metadata):
    urls = dict(line.split(", ") for line in metadata.get_all("Project-URL"))
    readme = metadata.get_payload(decode=True).decode()
    links = re.findall(r"(!?)\[[^\]]*\]\(([^)\s]+)\)", readme)
    relative = re.findall(r"\]\((?!http)([^)\s]+)\)", (ROOT / "README.md").read_text())
    here = [(picture, url) for picture, url in links if url.startswith(urls["Repository"])]
    assert all(url.startswith("https://") for _, url in links)
    assert len(here) == len(relative) > 20
    tag = f"v{metadata['Version']}"
    for picture, url in [*here, ("", urls["Changelog"]), ("", urls["Documentation"])]:
        view, version, path = url.removeprefix(urls["Repository"] + "/").split("/", 2)
        assert (view, version) == ("raw" if picture else "blob", tag)
        assert (ROOT / path.partition("#")[0]).is_file()
    assert len([url for picture, url in here if picture]) == readme.count("![") > 0
