"""Examples run as written: the README's, those in docstrings, and the notebook."""

import doctest
import importlib
import pathlib
import pkgutil
import re

import jax
import nbformat
import pytest
from nbclient import NotebookClient

import jax_ifa

ROOT = pathlib.Path(__file__).parent.parent
MODULES = sorted(module.name for module in pkgutil.walk_packages(jax_ifa.__path__, "jax_ifa."))


@pytest.fixture
def jax_as_users_have_it():
    """The examples are for JAX's defaults, not for the strict configuration of the tests."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.usefixtures("jax_as_users_have_it")
@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_the_public_functions_have_examples_that_run() -> None:
    found = sum(
        len(test.examples) for name in MODULES for test in doctest.DocTestFinder().find(importlib.import_module(name))
    )
    assert found > 10


@pytest.mark.usefixtures("jax_as_users_have_it")
def test_readme() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(block, {})


def test_readme_links_lead_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")]:
        for link in re.findall(r"\]\(([^)#\s]+)\)", page.read_text()):
            assert link.startswith("http") or (page.parent / link).exists(), f"{page.name}: {link}"


def test_every_module_is_in_the_public_documentation() -> None:
    """What `jax_ifa` exports has a docstring."""
    public = [name for name in vars(jax_ifa) if not name.startswith("_")]
    undocumented = [name for name in public if callable(getattr(jax_ifa, name)) and not getattr(jax_ifa, name).__doc__]
    assert not undocumented


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the Jupyter client's own
@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook(path: pathlib.Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}).execute()
    pictures = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 4
