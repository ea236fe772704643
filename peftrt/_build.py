"""Compiles csrc/ into peftrt/_C: used by setup.py and by ``python -m peftrt build``.

Two libraries: ``cpu``, and ``cuda`` where there is an ``nvcc``. Only the standard library is used, and torch is never
imported: its headers and libraries are all that is needed, and an isolated build sees them as a directory without being
able to import them.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

MODES = ("auto", "cpu", "cuda", "none")

# torch/csrc/stable as of torch 2.11: the oldest release that the library runs on, whatever it is compiled against.
TORCH_TARGET_VERSION = "0x020b000000000000"

# Contraction stays off: the nested scales are a product and a sum rounded apart (the kernels ask for FMA by name).
COMMON_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-ffp-contract=off")
CUDA_FLAGS = ("-O3", "-std=c++17", "-fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra")
CUDA_ARCHS = "8.0 8.6 8.9 9.0a 10.0"  # PEFTRT_CUDA_ARCHS names others
WARNING_FLAGS = ("-Wall", "-Wextra", "-Wno-psabi", "-Wno-unused-parameter", "-Wno-unknown-pragmas")

# GCC would make `rep movs` of the loops that copy floats, which takes longer to begin than the 64 bytes of a panel's
# row take to copy. clang does not, and would warn of the flag that it does not know.
KERNEL_FLAGS = ("-fno-tree-loop-distribute-patterns", "-Wno-ignored-optimization-argument")

# Every op file in csrc/cpu is compiled once for each of these; the choice falls at run time, by CPUID.
# NEON needs no flag to be there. But GCC's first scheduling pass moves loads so far up that the accumulators of the
# micro-kernel spill; clang does not.
ISA_FLAGS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "portable": (),
        "avx2": ("-mavx2", "-mfma", "-mf16c"),
        "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"),
    },
    "aarch64": {"portable": (), "neon": ("-fno-schedule-insns",)},
    "other": {"portable": ()},
}
_MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}


class BuildError(RuntimeError):
    """The native code was asked for and cannot be built; the message says why."""


@dataclass(frozen=True)
class Torch:
    """An installed torch, seen as a directory."""

    root: Path
    version: str

    @property
    def has_cuda(self) -> bool:
        """Whether it can load the CUDA library; any torch is enough to compile it."""
        return (self.root / "lib/libtorch_cuda.so").is_file()


@dataclass(frozen=True)
class Plan:
    """What will be compiled (``targets``, empty for none), with what, and the reason when something is left out.

    ``demanded``: that one target cannot be compiled is an error; otherwise it is one only where none can.
    """

    targets: tuple[str, ...]
    reason: str
    csrc: Path | None = None
    torch: Torch | None = None
    compiler: tuple[str, ...] = ()
    nvcc: tuple[str, ...] = ()
    archs: tuple[str, ...] = ()
    demanded: bool = True


@dataclass(frozen=True)
class _Unit:
    source: Path
    name: str
    flags: tuple[str, ...]


def library_name(target: str) -> str:
    """The file name of one target's library, e.g. ``libpeftrt_cpu.so``."""
    return f"libpeftrt_{target}.so"


def default_directory() -> Path:
    """Where the libraries lie beside this file: peftrt/_C."""
    return Path(__file__).resolve().parent / "_C"


def find_csrc() -> Path | None:
    """The C++ sources: shipped in an installed package as ``_csrc``, beside the package in a checkout."""
    here = Path(__file__).resolve().parent
    for candidate in (here / "_csrc", here.parent / "csrc"):
        if (candidate / "binding_cpu.cpp").is_file():
            return candidate
    return None


def find_torch() -> Torch | None:
    """The torch of the environment installed into: sys.path, then this prefix's site-packages, then $VIRTUAL_ENV.

    The second and third are for pip's build isolation, which takes site-packages off sys.path and leaves sys.prefix.
    """
    candidates = [Path(entry) for entry in sys.path if entry]
    candidates += [Path(sysconfig.get_path(key)) for key in ("purelib", "platlib")]
    if os.environ.get("VIRTUAL_ENV"):
        candidates += sorted(Path(os.environ["VIRTUAL_ENV"]).glob("lib*/python3*/site-packages"))
    for site in candidates:
        root = site / "torch"
        if (root / "include/torch/csrc/stable/library.h").is_file() and (root / "lib/libtorch_cpu.so").is_file():
            return Torch(root, _torch_version(root / "version.py"))
    return None


def _torch_version(path: Path) -> str:
    for line in path.read_text("utf8").splitlines() if path.is_file() else ():
        name, _, value = line.partition("=")
        if name.strip() == "__version__":
            return value.strip().strip("'\"")
    return "unknown"


def _too_old(version: str) -> bool:
    parts = version.split("+")[0].split(".")
    if len(parts) < 2 or not (parts[0].isdigit() and parts[1].isdigit()):
        return False
    return (int(parts[0]), int(parts[1])) < (2, 11)


def find_compiler() -> tuple[str, ...] | None:
    """$CXX (which may hold flags, such as ``ccache g++``), or the first of c++, g++ and clang++ on the path."""
    if os.environ.get("CXX"):
        command = tuple(shlex.split(os.environ["CXX"]))
        return command if command and shutil.which(command[0]) else None
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return (name,)
    return None


def find_nvcc() -> tuple[str, ...] | None:
    """$NVCC (which may hold flags), or nvcc on the path."""
    command = tuple(shlex.split(os.environ.get("NVCC") or "nvcc"))
    return command if command and shutil.which(command[0]) else None


def cuda_archs() -> tuple[str, ...]:
    """The compute capabilities to compile for, as $PEFTRT_CUDA_ARCHS has them: ``9.0a``, or ``8.0 9.0a``."""
    archs = tuple(re.split(r"[\s,;]+", (os.environ.get("PEFTRT_CUDA_ARCHS") or CUDA_ARCHS).strip()))
    for arch in archs:
        if re.fullmatch(r"\d+\.\d[af]?", arch) is None or float(arch.rstrip("af")) < 8:
            raise BuildError(f"PEFTRT_CUDA_ARCHS must hold capabilities from 8.0 on, such as '8.0 9.0a', got {arch!r}")
    return archs


def plan(mode: str = "auto", csrc: Path | None = None) -> Plan:
    """Decides what is built without building it.

    Args:
        mode: ``auto`` builds what can be built and used here; ``cpu`` and ``cuda`` demand the CPU library, and both;
            ``none`` builds nothing.
        csrc: the directory of the sources; searched for when None.

    Raises:
        BuildError: the mode is unknown, or demands what cannot be built here; the message says what is missing.
    """
    if mode not in MODES:
        raise BuildError(f"PEFTRT_BUILD must be one of {', '.join(MODES)}, got {mode!r}")
    if mode == "none":
        return Plan((), "PEFTRT_BUILD=none")
    csrc = csrc or find_csrc()
    torch, compiler, nvcc = find_torch(), find_compiler(), find_nvcc()
    missing = _missing(csrc, torch, compiler)
    if missing and mode != "auto":
        raise BuildError(f"PEFTRT_BUILD={mode}: {missing}")
    if missing:
        hint = "; `python -m peftrt build` compiles later. Until then the slower reference in torch runs"
        return Plan((), missing + hint)
    assert csrc is not None
    assert torch is not None
    without_cuda = "" if nvcc else "nvcc is not found; put it on the path or name it in NVCC"
    if not any((csrc / "cuda").glob("*.cu")):
        without_cuda = without_cuda or "the CUDA sources (csrc/cuda) are not here"
    if without_cuda and mode == "cuda":
        raise BuildError(f"PEFTRT_BUILD=cuda: {without_cuda}")
    if mode == "auto" and not torch.has_cuda:
        without_cuda = without_cuda or f"torch {torch.version} is not a build for CUDA"
    demanded, found = mode != "auto", (csrc, torch, compiler or ())
    if mode == "cpu" or without_cuda:
        return Plan(("cpu",), "" if mode == "cpu" else f"no CUDA library: {without_cuda}", *found, demanded=demanded)
    return Plan(("cpu", "cuda"), "", *found, nvcc or (), cuda_archs(), demanded)


def _missing(csrc: Path | None, torch: Torch | None, compiler: tuple[str, ...] | None) -> str:
    if csrc is None or not (csrc / "binding_cpu.cpp").is_file():
        return "the C++ sources (csrc/) are not here"
    if sys.platform != "linux":
        return f"the native library is for Linux, and this is {sys.platform}"
    if torch is None:
        return "no torch with headers is installed in this environment"
    if _too_old(torch.version):
        return f"torch {torch.version} in {torch.root} is older than 2.11"
    if compiler is None:
        wanted = os.environ.get("CXX")
        return f"the compiler CXX={wanted!r} is not found" if wanted else "no C++ compiler (c++, g++, clang++) is found"
    return ""


def source_files(csrc: Path, target: str | None = None) -> list[Path]:
    """Every file that the native code (of one target) is made of, headers included, in a fixed order."""
    files = sorted(path for path in csrc.rglob("*") if path.suffix in {".h", ".cpp", ".cu"})
    others = {"cpu", "cuda"} - {target} if target else set()
    return [path for path in files if not others & {path.parent.name, path.stem.removeprefix("binding_")}]


def isa_names(machine: str | None = None) -> tuple[str, ...]:
    """The instruction sets that the kernels are compiled for on an architecture, this machine's when None."""
    return tuple(_isa_table(machine))


def _isa_table(machine: str | None = None) -> dict[str, tuple[str, ...]]:
    name = (machine or platform.machine()).lower()
    return ISA_FLAGS.get(_MACHINES.get(name, name), ISA_FLAGS["other"])


def kernel_units(csrc: Path, extra: tuple[str, ...] = (), machine: str | None = None) -> list[_Unit]:
    """csrc/cpu as compiler calls: op files (nf4_*.cpp …) once an instruction set, everything else once."""
    table = _isa_table(machine)
    units = []
    for source in sorted((csrc / "cpu").glob("*.cpp")):
        if source.name == "dispatch.cpp":
            defines = tuple(f"-DPEFTRT_HAS_{isa.upper()}" for isa in table)
            units.append(_Unit(source, source.stem, (*extra, *defines)))
            continue
        for isa, flags in table.items():
            defines = (f"-DPEFTRT_ISA={isa}", f"-DPEFTRT_ISA_{isa.upper()}")
            units.append(_Unit(source, f"{source.stem}_{isa}", (*extra, *KERNEL_FLAGS, *defines, *flags)))
    return units


def _units(chosen: Plan, target: str) -> list[_Unit]:
    assert chosen.csrc is not None
    binding = chosen.csrc / f"binding_{target}.cpp"
    flags: tuple[str, ...] = (f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",)
    if target == "cpu":
        return [_Unit(binding, binding.stem, flags), *kernel_units(chosen.csrc)]
    # USE_CUDA: torch's header declares what it has for CUDA only then.
    flags += ("-DUSE_CUDA", f'-DPEFTRT_CUDA_ARCHS="{" ".join(chosen.archs)}"')
    numbers = [arch.replace(".", "") for arch in chosen.archs]
    code = tuple(f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers)
    kernels = sorted((chosen.csrc / "cuda").glob("*.cu"))
    return [_Unit(binding, binding.stem, flags), *(_Unit(source, source.stem, code) for source in kernels)]


def _version_of(compiler: tuple[str, ...], line: int = 0) -> str:
    result = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False)
    lines = (result.stdout or result.stderr).strip().splitlines()
    return lines[line] if lines else "unknown"


def _fingerprint(chosen: Plan, target: str, units: list[_Unit], compiler: str) -> str:
    assert chosen.csrc is not None
    digest = hashlib.sha256()
    for path in source_files(chosen.csrc, target):
        digest.update(str(path.relative_to(chosen.csrc)).encode() + b"\0" + path.read_bytes() + b"\0")
    digest.update(repr([(unit.name, unit.flags) for unit in units]).encode())
    flags = COMMON_FLAGS if target == "cpu" else (COMMON_FLAGS, CUDA_FLAGS, _libraries(chosen, target))
    digest.update(repr((flags, TORCH_TARGET_VERSION, compiler, platform.machine())).encode())
    return digest.hexdigest()


def read_stamp(directory: Path | None = None, target: str = "cpu") -> dict[str, object] | None:
    """What a built library was made from (torch, compiler, flags, instruction sets), or None where there is none."""
    path = (directory or default_directory()) / f"{library_name(target)}.json"
    try:
        return json.loads(path.read_text("utf8"))
    except (OSError, ValueError):
        return None


def build(chosen: Plan, directory: Path | None = None, force: bool = False) -> list[Path]:
    """Compiles a plan's targets, unless they are up to date.

    Args:
        chosen: what ``plan`` returned.
        directory: where the libraries go; peftrt/_C when None.
        force: compile even where nothing has changed.

    Returns:
        The libraries' paths.

    Raises:
        BuildError: the compiler failed; the message has its command and its output.
    """
    directory = directory or default_directory()
    libraries: list[Path] = []
    for target in reversed(chosen.targets):
        try:
            libraries.insert(0, _build_target(chosen, target, directory, force))
        except BuildError as error:
            if chosen.demanded or (target == "cpu" and not libraries):
                raise
            print(f"peftrt: {library_name(target)} is left out: {error}", file=sys.stderr)
    return libraries


def _build_target(chosen: Plan, target: str, directory: Path, force: bool) -> Path:
    assert chosen.torch is not None
    library = directory / library_name(target)
    units = _units(chosen, target)
    compiler = _version_of(chosen.compiler)
    if target == "cuda":
        compiler = f"{_version_of(chosen.nvcc, -2)}, and {compiler}"
    fingerprint = _fingerprint(chosen, target, units, compiler)
    stamp = read_stamp(directory, target)
    if not force and library.is_file() and stamp is not None and stamp.get("fingerprint") == fingerprint:
        return library
    print(f"peftrt: compiling {library.name} against torch {chosen.torch.version} with {compiler}", file=sys.stderr)
    directory.mkdir(parents=True, exist_ok=True)
    # The temporary directory is on the same filesystem as the library, so that the last step is one rename.
    with tempfile.TemporaryDirectory(prefix=".build-", dir=directory) as scratch:
        with concurrent.futures.ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            for _ in pool.map(_call, [_compile_command(chosen, unit, Path(scratch)) for unit in units]):
                pass
        built = Path(scratch) / library.name
        objects = [str(Path(scratch) / f"{unit.name}.o") for unit in units]
        # nvcc knows where its own runtime lies, which is linked into the library.
        linker = chosen.compiler if target == "cpu" else (*_nvcc(chosen), "-cudart=static")
        _call([*linker, "-shared", "-o", str(built), *objects, *_libraries(chosen, target)])
        os.replace(built, library)
    isa = {name: " ".join(flags) for name, flags in _isa_table().items()}
    details = {"flags": " ".join(COMMON_FLAGS), "isa": isa} if target == "cpu" else {"archs": list(chosen.archs)}
    record = {"fingerprint": fingerprint, "torch": chosen.torch.version, "compiler": compiler, **details}
    temporary = directory / f".{library.name}.json.{os.getpid()}"
    temporary.write_text(json.dumps(record, indent=1) + "\n", "utf8")
    os.replace(temporary, directory / f"{library.name}.json")
    return library


def _compile_command(chosen: Plan, unit: _Unit, scratch: Path) -> list[str]:
    assert chosen.torch is not None
    files = [f"-I{chosen.csrc}", "-c", str(unit.source), "-o", str(scratch / f"{unit.name}.o")]
    if unit.source.suffix == ".cu":
        # The architectures in parallel too: there are more of them than files.
        return [*_nvcc(chosen), *CUDA_FLAGS, "--threads=0", *unit.flags, *files]
    # Torch's headers are system headers: their warnings are not ours. Only the bindings see them.
    includes = ["-isystem", str(chosen.torch.root / "include")] if unit.name.startswith("binding_") else []
    return [*chosen.compiler, *COMMON_FLAGS, *WARNING_FLAGS, *unit.flags, *includes, *files]


def _nvcc(chosen: Plan) -> tuple[str, ...]:
    # A compiler of several words (ccache g++) is none that nvcc would take.
    return (*chosen.nvcc, *(f"-ccbin={name}" for name in chosen.compiler if len(chosen.compiler) == 1))


def _libraries(chosen: Plan, target: str) -> list[str]:
    """No rpath: torch is in the process before the library is loaded, and is then found by its soname."""
    assert chosen.torch is not None
    search = f"-L{chosen.torch.root / 'lib'}"
    if target == "cpu":
        return [search, "-ltorch_cpu", "-Wl,-z,defs", "-Wl,--as-needed"]
    # Where torch is for CPUs, what it lacks stays undefined: the library compiles, and loads with another torch.
    return [search, "-ltorch_cpu", *(["-ltorch_cuda"] if chosen.torch.has_cuda else [])]


def _call(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        output = (result.stderr or result.stdout).strip()
        raise BuildError(f"the compiler failed ({result.returncode}):\n{shlex.join(command)}\n{output}")
    if result.stderr.strip():
        print(result.stderr, file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    """``python peftrt/_build.py [--force] [auto|cpu|cuda|none]``: the build without importing peftrt."""
    arguments = sys.argv[1:] if arguments is None else arguments
    force = "--force" in arguments
    modes = [argument for argument in arguments if argument != "--force"]
    try:
        chosen = plan(modes[0] if modes else os.environ.get("PEFTRT_BUILD", "auto"))
        libraries = build(chosen, force=force)
    except BuildError as error:
        print(f"peftrt: {error}", file=sys.stderr)
        return 1
    for library in libraries:
        print(f"peftrt: {library} is up to date")
    if not libraries:
        print(f"peftrt: nothing is built: {chosen.reason}", file=sys.stderr)
    elif chosen.reason:
        print(f"peftrt: {chosen.reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
