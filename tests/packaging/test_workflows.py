"""The workflows: actions pinned by commit, and no code of the repository beside a signing token."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

WORKFLOWS = sorted((Path(__file__).parents[2] / ".github" / "workflows").glob("*.yml"))
each_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
# A commit, and the release that it is, for people and for Dependabot.
PINNED = re.compile(r"[\w.-]+/[\w.-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+")


def jobs_of(path: Path) -> dict[str, str]:
    """The text of each job."""
    _, _, jobs = path.read_text("utf-8").partition("\njobs:\n")
    names_and_texts = re.split(r"^  (\w+):\n", jobs, flags=re.MULTILINE)[1:]
    return dict(zip(names_and_texts[::2], names_and_texts[1::2]))


@each_workflow
def test_actions_are_pinned_by_commit(path: Path) -> None:
    used = re.findall(r"uses: (.*)", path.read_text("utf-8"))
    assert used
    for action in used:
        assert PINNED.fullmatch(action), action


@each_workflow
def test_a_job_with_a_token_runs_no_code_of_the_repository(path: Path) -> None:
    assert "permissions:\n  contents: read\n\n" in path.read_text("utf-8")
    signing = [text for text in jobs_of(path).values() if "id-token: write" in text]
    assert len(signing) == (3 if path.stem == "publish" else 0)
    for text in signing:
        assert "actions/checkout" not in text and "pip install" not in text
        assert "needs:" in text  # what it publishes was tested and built before


def test_nothing_is_published_before_it_is_tested() -> None:
    jobs = jobs_of(next(path for path in WORKFLOWS if path.stem == "publish"))
    needs = {name: re.findall(r"needs: (\w+)", text) for name, text in jobs.items()}
    order, job = [], "documentation"
    while needs[job]:
        (job,) = needs[job]
        order.append(job)
    assert order == ["publish", "attest", "build", "test"]
    assert ".ci/run" in jobs["test"] and "set-addresses --check" in jobs["test"]
