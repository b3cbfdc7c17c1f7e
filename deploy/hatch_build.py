"""What hatchling calls when it builds halve: compiles the kernels, if it can, and says what kind of wheel that makes.

hatchling looks for ``hatch_build.py`` in the project's root unless ``[tool.hatch.build.targets.wheel.hooks.custom]``
names another path, and pyproject.toml names this one. It runs for ``pip install``, ``pip install --editable`` and
``python -m build``, each time in an environment that holds hatchling alone; so the compiling itself is in a file
that needs the standard library only, and is loaded by its path.

With a compiler, the library is built beside its Python files (an editable install finds it there) and put into the
wheel. It contains nothing of Python's ABI, so the wheel fits every Python 3 on this platform. Without one, or where
compiling fails, the wheel is a pure one, halve works by its plain backend, and ``halve doctor`` says what is missing;
installers hide this file's warning unless they are told to be verbose. ``HALVE_REQUIRE_KERNELS=1`` turns the warning
into a failure.
"""

from __future__ import annotations

import importlib.util
import os
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_DIRECTORY = Path("serve", "kernels", "cpu")


class KernelsHook(BuildHookInterface):
    """Builds the library before a wheel is put together."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling; ``version`` is ``"editable"`` for editable installs, else ``"standard"``."""
        build = _load(Path(self.root, _DIRECTORY, "build.py"))
        try:
            build.compile_library(build.LIBRARY)
        except build.BuildError as error:
            if os.environ.get("HALVE_REQUIRE_KERNELS", "") not in ("", "0"):
                self.app.abort(f"error: HALVE_REQUIRE_KERNELS is set, and halve's kernels were not built: {error}")
            self.app.display_warning(
                f"warning: halve is installed without its C++ kernels, and will be slower. {error}\n"
                "Later, with a C++ compiler: python -m serve.kernels.cpu.build"
            )
            return
        if version == "editable":
            return  # it is found where it was built; the wheel itself holds a path and nothing else
        build_data["force_include"][str(build.LIBRARY)] = (_DIRECTORY / build.LIBRARY.name).as_posix()
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"


def _load(path: Path) -> ModuleType:
    """The module in a file, without the package around it."""
    spec = importlib.util.spec_from_file_location("halve_kernels_build", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
