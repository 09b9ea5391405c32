"""At the root, ``pytest`` collects ``tests/`` and ``pytest --benchmark-only`` ``benchmarks/``."""

import pytest


def pytest_ignore_collect(collection_path, config):
    if config.args_source is not pytest.Config.ArgsSource.TESTPATHS:
        return None  # the command line says what it wants
    unwanted = "tests" if config.getoption("benchmark_only", False) else "benchmarks"
    return True if config.rootpath / unwanted in collection_path.parents else None
