"""The scripts of `jobs/benchmarks` as modules, for the tests of them."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[1] / "jobs" / "benchmarks"


@contextmanager
def imported(*names: str) -> Iterator[dict[str, ModuleType]]:
    """Modules by name, gone again when the block ends; their folder is where their imports are looked for."""
    with pytest.MonkeyPatch.context() as patch:
        # As for a script that is run.
        patch.syspath_prepend(FOLDER)
        yield {name: importlib.import_module(name) for name in names}
        for name in names:
            sys.modules.pop(name, None)
