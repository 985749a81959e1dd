"""The wheel holds both packages whole, with recipes, templates and typing marks, and no READMEs."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {"sad": ROOT / "sad", "sad_kernels": ROOT / "kernels" / "sad_kernels"}


def expected_files() -> set[str]:
    """Every file of both packages but READMEs, under the name it has in a wheel."""
    return {
        f"{package}/{path.relative_to(folder).as_posix()}"
        for package, folder in SOURCES.items()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.name != "README.md"
    }


def complaints(names: set[str], expected: set[str]) -> list[str]:
    """What a wheel with these names lacks, and what it has too much of."""
    packed = {name for name in names if ".dist-info/" not in name}
    info = {name.partition(".dist-info/")[2] for name in names - packed}
    needed = {"entry_points.txt", "licenses/LICENSE"}
    return [
        *(f"misses {name}" for name in sorted(expected - packed)),
        *(f"holds {name}" for name in sorted(packed - expected)),
        *(f"misses {name}" for name in sorted(needed - info)),
    ]


def test_the_wheel_holds_what_it_should(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry = next(name for name in names if name.endswith("entry_points.txt"))
        assert "sad = sad.cli:main" in archive.read(entry).decode()
    assert complaints(names, expected_files()) == []
    assert {"sad/py.typed", "sad_kernels/py.typed", "sad/recipes/quickstart.yaml"} <= names
    assert {"sad/report/page.html.jinja", "sad/report/page.css"} <= names


SOUND = {"sad/a.py", "sad-1.dist-info/entry_points.txt", "sad-1.dist-info/licenses/LICENSE"}


@pytest.mark.parametrize(
    "names, expected, complaint",
    [
        (SOUND | {"tests/test_a.py"}, {"sad/a.py"}, "holds tests/test_a.py"),
        (SOUND, {"sad/a.py", "sad/recipes/q.yaml"}, "misses sad/recipes/q.yaml"),
        (SOUND - {"sad-1.dist-info/licenses/LICENSE"}, {"sad/a.py"}, "misses licenses/LICENSE"),
    ],
)
def test_a_planted_fault_is_flagged(names: set[str], expected: set[str], complaint: str) -> None:
    assert complaints(names, expected) == [complaint]
    assert complaints(SOUND, {"sad/a.py"}) == []
