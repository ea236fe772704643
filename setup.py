"""Builds the native library along with the Python packages; what it knows of compiling is in peftrt/_build.py."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path
from typing import ClassVar

from setuptools import Command, Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent


def _load_build_module():
    """peftrt/_build.py by its path: importing the package would import torch, which an isolated build does not have."""
    spec = importlib.util.spec_from_file_location("_peftrt_build", ROOT / "peftrt" / "_build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


native = _load_build_module()
PLAN = native.plan(os.environ.get("PEFTRT_BUILD", "auto"), csrc=ROOT / "csrc")


class BuildNative(Command):
    """Compiles csrc/ into peftrt/_C; a step of its own, since setuptools hides the errors of build_py when editable."""

    description = "compile the native kernels"
    user_options: ClassVar[list[tuple[str, str | None, str]]] = []

    def initialize_options(self):
        self.build_lib = None
        self.editable_mode = False

    def finalize_options(self):
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def _directory(self):
        return (ROOT if self.editable_mode else Path(self.build_lib)) / "peftrt" / "_C"

    def run(self):
        if PLAN.targets:
            native.build(PLAN, self._directory())
        else:
            # A build directory left from before must not slip a library into a wheel that says it has none.
            if not self.editable_mode:
                shutil.rmtree(self._directory(), ignore_errors=True)
            print(f"peftrt: no native code is built: {PLAN.reason}", file=sys.stderr)

    def get_source_files(self):
        return [str(path.relative_to(ROOT)) for path in native.source_files(ROOT / "csrc")]

    def get_outputs(self):
        libraries = [self._directory() / native.library_name(target) for target in PLAN.targets]
        # One that could not be compiled and was not demanded is left out.
        return [str(path) for path in libraries if path.is_file()]

    def get_output_mapping(self):
        return {}


class NativeDistribution(Distribution):
    """Says that there is machine code, so that setuptools files the package under platlib."""

    def has_ext_modules(self):
        return bool(PLAN.targets)


class Build(build):
    sub_commands: ClassVar = [*build.sub_commands, ("build_native", None)]


class BdistWheel(bdist_wheel):
    """The library links neither libpython nor a torch release, so one wheel a platform serves every Python 3."""

    def get_tag(self):
        platform = super().get_tag()[2]
        return ("py3", "none", platform if PLAN.targets else "any")


setup(
    distclass=NativeDistribution,
    packages=[
        *find_packages(str(ROOT), include=["peftrt", "peftrt.*"]),
        "peftrt.kernels",
        "peftrt._csrc",
        "peftrt._csrc.cpu",
        "peftrt._csrc.cuda",
    ],
    package_dir={"peftrt.kernels": "kernels", "peftrt._csrc": "csrc"},
    cmdclass={"build": Build, "build_native": BuildNative, "bdist_wheel": BdistWheel},
)
