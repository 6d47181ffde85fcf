"""Parts of all tests: Hypothesis profiles, tests in processes of their own, the GPU marker."""

from __future__ import annotations

import gc
import importlib.metadata
import os
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.internal.conjecture import providers

# Both must be set before a framework is imported. Two workers on two cores: one thread each.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# PyTorch's builds for CUDA bring Triton, which aborts the process if TensorFlow was loaded first.
with suppress(ImportError):
    import triton  # noqa: F401

# To compile for XLA takes most of the time of a test under it, and most of that goes into code that
# is fast. These flags are known to TensorFlow 2.21; others end the process at one they do not know.
QUICK_XLA = (
    "--xla_cpu_use_fusion_emitters=false"
    " --xla_cpu_parallel_codegen_split_count=1"
    " --xla_backend_optimization_level=0"
)

# The default finds in each run what it finds in every other; `nightly` searches where no run has
# been. Neither depends on how fast the machine is.
settings.register_profile(
    "deterministic",
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
)
settings.register_profile("thorough", settings.get_profile("deterministic"))
settings.register_profile(
    "nightly",
    derandomize=False,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
)
settings.load_profile("deterministic")

# Of the examples that a test asks for: the same ones in every run need not be many. A run with
# `--hypothesis-profile=thorough` draws all of them.
SHARES = {"deterministic": 0.2, "nightly": 20.0}

# Hypothesis also draws the constants in the source of whatever modules are imported, so that a
# file's examples would depend on the files that run with it. Only the nightly profile does that.
all_local_constants = providers._get_local_constants
no_local_constants = providers._local_constants


def local_constants() -> Any:
    nightly = settings.get_current_profile_name() == "nightly"
    return all_local_constants() if nightly else no_local_constants


providers._get_local_constants = local_constants


@pytest.hookimpl(trylast=True)  # after Hypothesis has marked its tests
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    profile = settings.get_current_profile_name()
    multiply_examples(items, SHARES.get(profile, 1.0))
    if profile == "deterministic":
        later = [item for item in items if item.get_closest_marker("nightly")]
        items[:] = [item for item in items if item not in later]
        config.hook.pytest_deselected(items=later)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Take the frameworks' and the tests' own objects, millions, out of each garbage collection.

    Collections are also rarer: tracing a graph makes millions of objects, and keeps most of them.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def multiply_examples(items: list[pytest.Item], factor: float) -> None:
    """Draw more or fewer examples in each test, from the number that it asks for."""
    functions: list[Any] = [
        item.obj
        for item in items
        if isinstance(item, pytest.Function) and item.get_closest_marker("hypothesis")
    ]
    # Each access binds a method anew; the function under it carries the settings, unless the test
    # runs a state machine, whose settings are its own.
    for function in {getattr(function, "__func__", function) for function in functions}:
        own = getattr(function, "_hypothesis_internal_use_settings", None)
        if own is not None:
            examples = max(min(10, own.max_examples), round(factor * own.max_examples))
            function._hypothesis_internal_use_settings = settings(own, max_examples=examples)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


def knows_quick_xla() -> bool:
    try:
        return importlib.metadata.version("tensorflow").startswith("2.21.")
    except importlib.metadata.PackageNotFoundError:
        return False


@pytest.hookimpl(trylast=True)  # after Hypothesis has loaded the profile
def pytest_configure(config: pytest.Config) -> None:
    if settings.get_current_profile_name() == "deterministic" and knows_quick_xla():
        os.environ.setdefault("XLA_FLAGS", QUICK_XLA)
    config.addinivalue_line(
        "markers",
        "processes(*counts, **options): run in so many processes at once. With several counts, the "
        "test runs as often, each time with the same arguments: what one run leaves in `tmp_path`, "
        "the next one finds. The folder's fixture `server` makes the processes.",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    marker = pyfuncitem.get_closest_marker("processes")
    if marker is None:
        return None
    server = pyfuncitem._request.getfixturevalue("server")
    names = pyfuncitem._fixtureinfo.argnames
    arguments = {name: pyfuncitem.funcargs[name] for name in names}
    for count in marker.args:
        outcomes = server.run(pyfuncitem.obj, arguments, count, **marker.kwargs)
        reports = [
            f"rank {rank} of {count} {outcome}"
            for rank, outcome in enumerate(outcomes)
            if outcome.status
        ]
        if reports:
            pytest.fail("\n".join(reports), pytrace=False)
    return True
