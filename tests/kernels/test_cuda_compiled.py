"""The machine code of the CUDA kernels: registers, spills, and loads in flight. Needs no GPU.

A performance property that is not tested may be lost with the next compiler: `#pragma unroll 8`
over 16-byte loads alone leaves 4 in flight.
"""

import functools
import re
import subprocess

import pytest
from toolkit import IS_CHECK_CUDA, ROOT, find_cuobjdump, find_toolkit, missing

# Without 8.9, for which the compiler makes what it makes for 8.6.
ARCHITECTURES = ["75", "80", "86", "90", "100", "120"]


def each(*architectures):
    """Parametrize by architectures. Each takes twenty seconds: `make test` is content with 9.0."""
    return pytest.mark.parametrize("arch", architectures if IS_CHECK_CUDA else ["90"])


# Kernels per table size: three norms in float32, one in float64, scale, clamp; and of results for each
# tensor, norms of order 2, statistics of orders 1 and 2, and both in float64.
KERNELS_PER_TABLE = 10
TABLES = 2  # of all kernels
MORE_TABLES = {"norm_kernel": 1, "scale_kernel": 1, "clamp_kernel": 1}  # the medium one; of norms, order 2
OTHER_KERNELS = 1  # adaptive clipping has a table of its own
# So that 4 blocks fit on a multiprocessor, as launch.cu counts on, or 3 of some kernels.
MAX_REGISTERS, MAX_REGISTERS_OF_3_BLOCKS = 64, 80
KERNELS_OF_3_BLOCKS = ("adaptive_kernel", "tensors_float64_kernel")
# Bytes of local memory. An array that is not in registers is there, and is no spill to ptxas: with its
# vectors there, the norm kernel ran at a third of its speed on an H200.
STACK_FRAMES = {"tensors_float64_kernel": 32}
TOOLKIT = find_toolkit()

pytestmark = pytest.mark.toolkit
if TOOLKIT is None:
    missing("no CUDA toolkit on this machine")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """compiled(arch) -> (cubin, what ptxas said), each architecture once."""
    folder = tmp_path_factory.mktemp("cubin")
    done = {}

    def compile_for(arch, *defines):
        if (arch, defines) not in done:
            cubin = folder / f"sm_{arch}{''.join(defines)}.cubin"
            flags = [
                "-std=c++17",
                "-O3",
                "-lineinfo",
                "-Xptxas",
                "-v",
                "-cubin",
                "-I",
                ROOT / "csrc",
                *defines,
            ]
            target = ["-gencode", f"arch=compute_{arch},code=sm_{arch}", "-o", cubin]
            command = [TOOLKIT / "bin" / "nvcc", *flags, *target, ROOT / "csrc" / "cuda" / "launch.cu"]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if "Unsupported gpu architecture" in result.stderr:
                missing(f"this toolkit does not know sm_{arch}")
            assert result.returncode == 0, result.stderr
            done[arch, defines] = cubin, result.stderr
        return done[arch, defines]

    return compile_for


def resources(report):
    """Yield (kernel, registers, bytes spilled, bytes of stack) for every kernel that ptxas reports."""
    pattern = (
        r"Compiling entry function '\w*?4cuda\d+([a-z]\w*?_kernel)[IE]\w+' for.*?(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    )
    for match in re.finditer(pattern, report, re.DOTALL):
        kernel, stack, stores, loads, registers = match.groups()
        yield kernel, int(registers), int(stores) + int(loads), int(stack)


@each(*ARCHITECTURES)
def test_registers_and_spills(compiled, arch):
    _, report = compiled(arch)
    found = list(resources(report))
    assert len(found) == KERNELS_PER_TABLE * TABLES + sum(MORE_TABLES.values()) + OTHER_KERNELS, report
    for kernel, registers, spilled, stack in found:
        assert stack <= STACK_FRAMES.get(kernel, 0), f"{kernel} has {stack} bytes of stack on sm_{arch}"
        assert spilled == 0, f"{kernel} spills {spilled} bytes on sm_{arch}"
        most = MAX_REGISTERS_OF_3_BLOCKS if kernel in KERNELS_OF_3_BLOCKS else MAX_REGISTERS
        assert registers <= most, f"{kernel} takes {registers} registers on sm_{arch}"
    # A function called from a kernel may spill, too.
    assert not re.search(r"[1-9]\d* bytes spill", report), report


@pytest.mark.skipif(not IS_CHECK_CUDA, reason="compiles once more, in `make check-cuda`")
def test_what_old_toolkits_get_takes_small_parameters(compiled):
    """Before CUDA 12.1 a launch has at most 4 KiB of parameters; only the small table exists, and it fits."""
    _, report = compiled("80", "-DGRADCLIP_EXT_SMALL_LAUNCHES")
    kernels = KERNELS_PER_TABLE + OTHER_KERNELS
    assert len(list(resources(report))) == kernels, report
    constants = [int(n) for n in re.findall(r"(\d+) bytes cmem\[0\]", report)]
    # Besides the parameters, the bank holds what the driver passes: 352 bytes on sm_80.
    assert len(constants) == kernels and max(constants) <= 4096 + 352, report


def longest_bursts(listing, kernel):
    """Return, for each instance of a kernel in a SASS listing, its runs of 128-bit loads.

    A run is broken by whatever is not a load, the integer arithmetic of its address, or a move, of which
    CS2R is one that sets two registers to 0.
    """
    others = ("CS2R", "IADD", "IMAD", "ISETP", "LEA", "MOV", "UMOV", "NOP", "VIADD")
    instances = re.split(r"Function : ", listing)[1:]
    for text in (t for t in instances if f"{len(kernel)}{kernel}" in t.split("\n", 1)[0]):
        runs, run = [], 0
        for opcode in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d\s+)?([A-Z][A-Z0-9_.]*)", text):
            if opcode.startswith("LDG") and ".128" in opcode:
                run += 1
            elif not opcode.startswith(others):
                runs, run = [*runs, run], 0
        yield sorted([*runs, run], reverse=True)


@pytest.fixture(scope="module")
def listing_for(compiled):
    """listing_for(arch) -> SASS, each architecture once."""
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        missing("no cuobjdump: neither the CUDA toolkit nor Triton's wheel has one here")

    @functools.cache
    def listing_for(arch):
        cubin, _ = compiled(arch)
        return subprocess.run([cuobjdump, "-sass", cubin], capture_output=True, text=True, check=True).stdout

    return listing_for


@pytest.mark.parametrize("kernel", ["norm_kernel", "tensors_kernel"])
@each("80", "90")
def test_the_norm_kernels_keep_eight_loads_in_flight(listing_for, arch, kernel):
    bursts = list(longest_bursts(listing_for(arch), kernel))
    expected = 3 * TABLES + MORE_TABLES.get(kernel, 0)
    assert len(bursts) == expected, f"{len(bursts)} kernels like {kernel} found in the SASS"
    for runs in bursts:
        # One main loop for each of float32, bfloat16 and float16.
        assert runs[:3] == [8, 8, 8], f"runs of 128-bit loads on sm_{arch}: {runs[:6]}"


@pytest.mark.parametrize("kernel", ["scale_kernel", "clamp_kernel"])
@each("80", "90")
def test_four_loads_are_in_flight_in_place_also_where_a_tensor_ends(listing_for, arch, kernel):
    bursts = list(longest_bursts(listing_for(arch), kernel))
    expected = TABLES + MORE_TABLES[kernel]
    assert len(bursts) == expected, f"{len(bursts)} kernels like {kernel} found in the SASS"
    for runs in bursts:  # of four dtypes, each in full tiles and in the last tile of a tensor
        assert runs[:8] == [4] * 8, f"runs of 128-bit loads on sm_{arch}: {runs[:10]}"


@each("90", "120")
def test_the_scale_kernel_finds_its_tensor_before_it_waits(listing_for, arch):
    instances = [t for t in re.split(r"Function : ", listing_for(arch)) if "12scale_kernel" in t[:80]]
    assert len(instances) == TABLES + MORE_TABLES["scale_kernel"]
    for text in instances:
        before, waits, _ = text.partition("ACQBULK")
        branches = re.findall(r"/\*([0-9a-f]{4,})\*/\s+@!?P\d BRA 0x([0-9a-f]+)", before)
        loops = [(at, to) for at, to in branches if int(to, 16) < int(at, 16)]
        assert waits and loops, "the binary search, which is a loop, does not stand above the wait"


def test_the_reader_of_sass_can_fail():
    line = "        /*0a00*/                   {} ;\n"
    loads = line.format("LDG.E.128.CONSTANT R4, desc[UR4][R2.64]")
    listing = "Function : x11norm_kernel\n" + loads * 4 + line.format("FFMA R1, R4, R4, R1") + loads * 4
    assert list(longest_bursts(listing, "norm_kernel")) == [[4, 4]]
