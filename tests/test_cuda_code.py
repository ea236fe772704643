"""What nvcc makes of csrc/cuda for sm_90a: it compiles, links, spills nothing, has the instructions that it is to have.

Where there is no nvcc all of it is left out. Nothing here needs a device.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
from pathlib import Path

import pytest

from peftrt import _build
from tests.kernels import sass

CSRC = _build.find_csrc()
NVCC = _build.find_nvcc()
pytestmark = pytest.mark.skipif(NVCC is None or CSRC is None, reason="nvcc or the sources are not here")
REGISTERS = 65536  # of a multiprocessor
THREADS = {
    "linear_kernel": 512,
    "linear_any": 1024,
    "wide_kernel": 384,
    "dequantize": 1024,
    "quantize": 1024,
    "quantize_scales": 1024,
    "multi_linear_kernel": 512,
    "multi_linear_any": 512,
    "shrink": 512,
}
PRODUCERS = 128  # of a block of wide_kernel, which gives its registers to the others


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One instance: what ptxas says of it, and its machine code (empty where the disassembler cannot read it)."""

    name: str
    report: str
    code: list[sass.Line]

    @property
    def family(self) -> str:
        return next(name for name in sorted(THREADS, key=len, reverse=True) if f"{len(name)}{name}" in self.name)

    @property
    def threads(self) -> int:
        """Of a block."""
        few_tokens = self.family == "wide_kernel" and "Li64ELi" in self.name
        return 512 if few_tokens else THREADS[self.family]

    def number(self, pattern: str) -> int:
        found = re.search(pattern, self.report)
        return int(found[1]) if found else 0


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[Kernel]:
    """Every kernel of csrc/cuda, compiled for sm_90a with the flags of the build."""
    assert CSRC is not None
    assert NVCC is not None
    found = []
    for source in sorted((CSRC / "cuda").glob("*.cu")):
        cubin = tmp_path_factory.mktemp("cubin") / f"{source.stem}.cubin"
        flags = [flag for flag in _build.CUDA_FLAGS if not flag.startswith("-Xcompiler")]
        target = ["-gencode=arch=compute_90a,code=sm_90a", "-Xptxas=-v", "-cubin"]
        command = [*NVCC, *flags, *target, f"-I{CSRC}", str(source), "-o", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        code = machine_code(cubin)
        for report in (done.stdout + done.stderr).split("Compiling entry function")[1:]:
            name = report.split("'")[1]
            found.append(Kernel(name, report, code.get(name, [])))
    return found


def machine_code(cubin: Path) -> dict[str, list[sass.Line]]:
    """The instructions of each function; nothing where the disassembler is older than the compiler."""
    command = [str(sass.TOOLS / "nvdisasm"), "-c", str(cubin)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return {}
    parts = re.split(r"^\.text\.(\S+):$", done.stdout, flags=re.MULTILINE)
    return {name: sass.parse(text) for name, text in zip(parts[1::2], parts[2::2], strict=True)}


def linear(kernels: list[Kernel], family: str = "linear_kernel") -> list[Kernel]:
    found = [kernel for kernel in kernels if kernel.family == family]
    if not all(kernel.code for kernel in found):
        pytest.skip("the disassembler does not read this compiler's code")
    return found


def test_nothing_is_spilt_and_registers_fit(kernels: list[Kernel]) -> None:
    assert {kernel.family for kernel in kernels} == set(THREADS)
    for kernel in kernels:
        assert kernel.number(r"(\d+) bytes spill stores") == 0, kernel.report
        assert kernel.number(r"(\d+) bytes stack frame") == 0, kernel.report
        assert kernel.number(r"Used (\d+) registers") * kernel.threads <= REGISTERS, kernel.report


FEW_ROWS = pytest.mark.parametrize("family", ["linear_kernel", "multi_linear_kernel"])


@FEW_ROWS
def test_products_are_tensor_cores_and_copies_are_16_bytes(family: str, kernels: list[Kernel]) -> None:
    # both dtypes; 8 ... 32 rows with scales by 32 and by 64 columns, 64 rows with the first
    assert len(linear(kernels, family)) == 2 * (2 * 3 + 1)
    for kernel in linear(kernels, family):
        assert sass.count(kernel.code, "HMMA") > 0, kernel.name
        assert sass.count(kernel.code, "LDSM") > 0, kernel.name
        copies = [text for kind, text in kernel.code if kind == "instruction" and text.startswith("LDGSTS")]
        assert copies, kernel.name
        assert all("128" in text.split()[0] for text in copies), copies
        assert sass.count(kernel.code, "LDL", "STL") == 0, kernel.name


@FEW_ROWS
def test_a_look_up_is_two_instructions_and_nothing_branches(family: str, kernels: list[Kernel]) -> None:
    for kernel in linear(kernels, family):
        block = next(block for block in basic_blocks(kernel.code) if any(text.startswith("HMMA") for text in block))
        # a lane looks 16 bytes up for 32 columns of 32 rows, and does so twice where the loop is unrolled
        permutations = sum(text.startswith("PRMT") for text in block)
        look_ups = [text for text in block if re.match(r"LDS R\d+, \[R\d+\+0x400\]", text)]
        few_rows = sum(text.startswith("HMMA") for text in block) == 8
        if few_rows:
            # one word of four without: 16 permutations for 8 codes. Beside them and the look-ups there is little.
            assert (len(look_ups), permutations) == (24, 24 + 2 * 16), kernel.name
            assert len(block) <= 3 * permutations, (kernel.name, len(block))
        else:
            assert len(look_ups) == permutations, kernel.name
            assert permutations in (16, 32), kernel.name


def test_adapters_are_read_16_bytes_at_a_time_all_of_a_page_at_once(kernels: list[Kernel]) -> None:
    """By each dtype of values, pages of B by columns and one adapter's B by ranks; and asked for before the steps."""
    for kernel in linear(kernels, "multi_linear_kernel"):
        texts = [text for kind, text in kernel.code if kind == "instruction"]
        prefetched = [i for i, text in enumerate(texts) if text.startswith("CCTL.E.PF2")]
        products = [i for i, text in enumerate(texts) if text.startswith("HMMA")]
        assert prefetched, kernel.name
        assert max(prefetched) < products[0], kernel.name
        loads = [i for i, text in enumerate(texts) if text.startswith("LDG.E.128") and i > products[-1]]
        assert len(loads) >= 2 * 3 * 8, (kernel.name, len(loads))
    for kernel in linear(kernels, "shrink"):
        texts = [text for kind, text in kernel.code if kind == "instruction"]
        assert sum(text.startswith("LDG.E.128") for text in texts) >= 1 + 8, kernel.name
        # 8 ranks of a warp are added up by 9 exchanges
        assert sum(text.startswith("SHFL.BFLY") for text in texts) in (9, 18), kernel.name


def test_products_of_many_rows_are_wgmma_from_registers(kernels: list[Kernel]) -> None:
    # both dtypes, tiles of 64 and 128 rows of x, scales by 32 and by 64 columns
    assert len(linear(kernels, "wide_kernel")) == 2 * 2 * 2
    for kernel in linear(kernels, "wide_kernel"):
        tokens = 64 if kernel.threads == 512 else 128
        products = [text for kind, text in kernel.code if kind == "instruction" and text.startswith("HGMMA")]
        assert len(products) == 8, kernel.name  # 128 columns, 16 at a time
        for text in products:
            assert re.match(rf"HGMMA\.64x{tokens}x16\.F32(\.BF16)? R\d+, R\d+, gdesc\[UR\d+\]", text), text
        # a group for each unit of columns that have one scale
        assert sum("gsb0" in text for text in products) == (2 if "ELi64EEE" in kernel.name else 4), kernel.name
        copies = [text for kind, text in kernel.code if kind == "instruction" and text.startswith("LDGSTS")]
        assert copies, kernel.name
        assert all("128" in text.split()[0] for text in copies), copies


def test_no_wgmma_is_serialised_nor_overtaken(kernels: list[Kernel]) -> None:
    """ptxas says so where it waits after each; registers that one in flight reads are not written."""
    for kernel in linear(kernels, "wide_kernel"):
        assert "C75" not in kernel.report, kernel.report
        assert sass.races(kernel.code) == [], kernel.name
        assert unprepared(kernel.code) == [], kernel.name


def unprepared(code: list[sass.Line]) -> list[str]:
    """Instructions that write a register between the preparation of a group of products and the one that reads it."""
    found = []
    for i, (_, text) in enumerate(code):
        operand = re.match(r"HGMMA\S*\s+R\d+,\s*R(\d+)", text)
        if operand is None:
            continue
        reads = set(range(int(operand[1]), int(operand[1]) + 4))
        prepared = max(j for j in range(i) if code[j][1].startswith("WARPGROUP.ARRIVE"))
        between = [line for kind, line in code[prepared:i] if kind == "instruction" and not line.startswith("HGMMA")]
        found += [line for line in between if sass.written(line) & reads]
    return found


@pytest.mark.parametrize(
    ("between", "found"), [("LDS R12, [R1]", 0), ("LDS R9, [R1]", 1), ("LDS.128 R4, [R1]", 0), ("MOV R8, R1", 1)]
)
def test_what_is_written_too_late_is_found(between: str, found: int) -> None:
    product = "HGMMA.64x64x16.F32 R24, R8, gdesc[UR4], R24, gsb0"
    texts = ["MOV R8, R2", "WARPGROUP.ARRIVE", between, product]
    assert len(unprepared([("instruction", text) for text in texts])) == found


def test_registers_change_hands_within_what_there_is(kernels: list[Kernel]) -> None:
    for kernel in linear(kernels, "wide_kernel"):
        listing = "\n".join(text for _, text in kernel.code)
        taken = re.findall(r"USETMAXREG\.TRY_ALLOC\S* \w+, 0x([0-9a-f]+)", listing)
        left = re.findall(r"USETMAXREG\.DEALLOC\S* 0x([0-9a-f]+)", listing)
        assert (len(taken), len(left)) == (1, 1), kernel.name
        needed = int(taken[0], 16) * (kernel.threads - PRODUCERS) + int(left[0], 16) * PRODUCERS
        assert needed <= kernel.number(r"Used (\d+) registers") * kernel.threads <= REGISTERS, kernel.name
        assert max(int(number) for number in re.findall(r"\bR(\d+)\b", listing)) < int(taken[0], 16), kernel.name


def test_a_step_of_many_rows_is_little_more_than_look_ups_and_sums(kernels: list[Kernel]) -> None:
    """Of a warp, for 16 rows and 128 columns: 32 look-ups of two instructions, and a sum's scaling for each unit."""
    for kernel in linear(kernels, "wide_kernel"):
        step = main_loop(kernel.code)
        assert sum(bool(re.match(r"LDS R\d+, \[R\d+\+0x400\]", text)) for text in step) == 32, kernel.name
        scaled = (32 if kernel.threads == 512 else 64) * (2 if "ELi64EEE" in kernel.name else 4)
        assert sum(text.startswith("FFMA") for text in step) == scaled, kernel.name
        # the rest: codes and scales in, eight products and their operands' addresses, waiting, where the step lies
        assert len(step) <= scaled + 2 * 32 + 150, (kernel.name, len(step))


def main_loop(code: list[sass.Line]) -> list[str]:
    """What is between the first product's preparation and the last sum's scaling."""
    texts = [text for kind, text in code if kind == "instruction"]
    first = next(i for i, text in enumerate(texts) if text.startswith("WARPGROUP.ARRIVE"))
    products = [i for i, text in enumerate(texts) if text.startswith("HGMMA")]
    last = next(i for i, text in enumerate(texts) if i > products[-1] and text.startswith("WARPGROUP.DEPBAR"))
    while True:
        ahead = next((i for i in range(last + 1, last + 40) if texts[i].startswith("FFMA")), None)
        if ahead is None:
            return texts[first : last + 1]
        last = ahead


def basic_blocks(code: list[sass.Line]) -> list[list[str]]:
    blocks: list[list[str]] = [[]]
    for kind, text in code:
        if kind == "label":
            blocks.append([])
            continue
        blocks[-1].append(text)
        if text.split()[0].split(".")[0] in ("BRA", "EXIT", "RET", "CALL"):
            blocks.append([])
    return blocks


def test_decoding_is_below_the_roof_of_memory(kernels: list[Kernel]) -> None:
    """15.6 instructions a weight and lane are what 4.8 TB/s leave for 16-bit outputs: csrc/cuda/nf4_dequantize.cu."""
    found = [kernel for kernel in kernels if kernel.family == "dequantize" and "Lb1E" in kernel.name]
    assert len(found) == 3
    if not all(kernel.code for kernel in found):
        pytest.skip("the disassembler does not read this compiler's code")
    for kernel in found:
        stores = sum(kind == "instruction" and text.startswith("STG.E.EF.128") for kind, text in kernel.code)
        assert stores == 4, kernel.name
        if "f16" in kernel.name:
            loop = max(len(block) for block in basic_blocks(kernel.code))
            assert loop / 32 < 12, (kernel.name, loop)


def test_the_library_is_compiled_and_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTRT_CUDA_ARCHS", "9.0a")
    plan = dataclasses.replace(_build.plan("cuda"), targets=("cuda",))
    (library,) = _build.build(plan, tmp_path)
    assert library.name == "libpeftrt_cuda.so"
    stamp = _build.read_stamp(tmp_path, "cuda")
    assert stamp is not None
    assert stamp["archs"] == ["9.0a"]
    listing = subprocess.run(["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True)
    missing = {line.split()[-1] for line in listing.stdout.splitlines()}
    # the runtime of CUDA is in it; what torch has for CUDA comes from torch
    assert not [name for name in missing if name.startswith(("cuda", "__cuda"))]
    assert "aoti_torch_get_current_cuda_stream" in missing
