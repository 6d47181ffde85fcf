"""The examples that users read: in docstrings, in the packages' READMEs and in docs/.

Those of docs/distributed.md run on several processes, in autoclip_torch/distributed.
"""

from __future__ import annotations

import doctest
import importlib
import re
import textwrap
from pathlib import Path
from unittest.mock import patch

import pytest

from autoclip.core.adapter import RULES

ROOT = Path(__file__).parents[1]
PACKAGES = sorted((ROOT / "packages").iterdir())
PAGES = [
    ROOT / "README.md",
    *(package / "README.md" for package in PACKAGES),
    *(
        ROOT / "docs" / f"{name}.md"
        for name in ("core", "recipes", "rules", "state-format", "torch", "tensorflow", "trainers")
    ),
]

# By name, not by path: pointed at a folder named `torch`, doctest takes it for torch itself.
MODULES = sorted(
    ".".join(path.relative_to(package / "src").with_suffix("").parts).removesuffix(".__init__")
    for package in PACKAGES
    for path in package.glob("src/**/*.py")
)


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # examples may write files
    if name == "autoclip.torch.deepspeed":
        pytest.importorskip("deepspeed", reason="DeepSpeed is not part of this environment")
    with patch.dict(RULES):  # some examples register one
        results = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert results.failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_pages(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^( *)```python\n(.*?)^\1```", page.read_text("utf-8"), re.M | re.S)
    assert blocks
    namespace: dict[str, object] = {"__name__": "example"}
    with patch.dict(RULES):  # docs/rules.md adds some
        for _, block in blocks:  # later ones use what earlier ones made, as a reader would
            # Without the imports from the future that this file has.
            code = compile(textwrap.dedent(block), str(page), "exec", dont_inherit=True)
            exec(code, namespace)
