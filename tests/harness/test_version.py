"""A checkout is known by its commit."""

import subprocess
from pathlib import Path

from harness.version import commit_of


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_a_checkout_has_its_commit_and_says_when_files_differ(tmp_path: Path) -> None:
    git(tmp_path, "init", "--quiet")
    assert commit_of(tmp_path) == "", "there is none yet"
    file = tmp_path / "engine.py"
    file.write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "one")
    git(tmp_path, "tag", "-a", "v1", "-m", "a tag is no commit")
    commit = git(tmp_path, "rev-parse", "HEAD")[:12]
    assert commit_of(tmp_path) == commit
    file.write_text("2")
    assert commit_of(tmp_path) == f"{commit}.dirty"


def test_a_new_file_of_the_engine_is_a_difference_and_one_of_the_user_is_none(tmp_path: Path) -> None:
    git(tmp_path, "init", "--quiet")
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "run.py").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "one")
    commit = git(tmp_path, "rev-parse", "HEAD")[:12]
    (tmp_path / "matrix.toml").write_text("mine")
    assert commit_of(tmp_path) == commit
    (tmp_path / "engine" / "new.py").write_text("deployed as well")
    assert commit_of(tmp_path) == f"{commit}.dirty"


def test_a_folder_inside_another_checkout_has_none(tmp_path: Path) -> None:
    git(tmp_path, "init", "--quiet")
    (tmp_path / "site-packages").mkdir()
    assert commit_of(tmp_path / "site-packages") == ""
