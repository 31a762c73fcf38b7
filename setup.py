"""Builds the compiled modules; metadata is in pyproject.toml. Neither torch nor a GPU is needed.

Environment variables:
    GRADCLIP_EXT_BUILD=auto|cuda|cpu|none: auto (the default) builds what the compiler and the CUDA toolkit
        allow; what fails is left out, and `python -m gradclip_ext.info` says why. cuda and cpu insist: what
        cannot be built is an error.
    TORCH_CUDA_ARCH_LIST: as for torch's own extensions, "8.0;9.0+PTX". Without it the visible GPUs decide,
        and without any, those of ARCHITECTURES below that the toolkit knows.
    CXX, CFLAGS, CXXFLAGS, LDFLAGS, CUDA_HOME, CUDA_PATH, MAX_JOBS: as usual.
    GRADCLIP_EXT_TESTING=1: builds gradclip_ext._testing, too, which the project's tests call.
    GRADCLIP_EXT_CUDART=shared: links the CUDA runtime dynamically, for the tests that replace it.
    GRADCLIP_EXT_REPOSITORY=https://github.com/<owner>/<name>: for what is uploaded to a package index, where
        the metadata names the project's pages and README's links have to be absolute.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(
        f"gradclip_ext needs setuptools 77 or later to be built, this is {setuptools.__version__}: run "
        "pip install 'setuptools>=77' 'pybind11>=3.0', or leave out --no-build-isolation"
    )

ROOT = Path(__file__).parent
PLATFORM = sysconfig.get_platform()  # what is compiled for, which _PYTHON_HOST_PLATFORM may change
MODES = ("auto", "cuda", "cpu", "none")
ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
OLDEST_CAPABILITY = (7, 0)
# What a build leaves beside the Python files.
BUILT = ("_C.*", "_testing.*", "_build_info.py")


class BuildError(Exception):
    """Something cannot be built. The message is one sentence."""


# ---------------------------------------------------------------- compilers


def asked_mode():
    asked = os.environ.get("GRADCLIP_EXT_BUILD", "auto")
    if asked not in MODES:
        sys.exit(f"GRADCLIP_EXT_BUILD={asked!r} is not one of {', '.join(MODES)}")
    return asked


def find_compiler():
    """Return the command of the C++ compiler."""
    if not PLATFORM.startswith(("linux", "macosx")):
        raise BuildError(f"the compiled module is built on Linux and macOS only, this is {PLATFORM}")
    asked = shlex.split(os.environ.get("CXX", ""))
    for command in (asked,) if asked else (["c++"], ["g++"]):
        if shutil.which(command[0]):
            return command
    raise BuildError("no C++ compiler was found (looked for $CXX, c++ and g++)")


def find_toolkit():
    """Return the CUDA toolkit's folder. An nvcc on PATH may be a wrapper far away from it."""
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates += [Path(nvcc).resolve().parents[1]] if nvcc else []
    candidates += ["/usr/local/cuda", "/opt/cuda"]
    for folder in map(Path, filter(None, candidates)):
        if (folder / "include" / "cuda_runtime.h").is_file() and (folder / "bin" / "nvcc").is_file():
            return folder
    raise BuildError("no CUDA toolkit was found (CUDA_HOME, nvcc on PATH, /usr/local/cuda): set CUDA_HOME")


def output_of(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"{command[0]} cannot be run: {error}") from error


def cuda_architectures(nvcc):
    """Return what to compile for, such as ["8.0", "9.0+PTX"]: machine code, and PTX for later GPUs."""
    asked = re.split(r"[;, ]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip())
    if asked != [""]:
        for entry in asked:
            if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", entry):
                raise BuildError(f"TORCH_CUDA_ARCH_LIST holds {entry!r}; entries look like 9.0 or 9.0+PTX")
        return asked
    known = re.findall(r"compute_(\d+)", output_of(nvcc, "--list-gpu-arch"))
    chosen = visible = visible_architectures()
    if not visible or not all(v.replace(".", "") in known for v in visible):
        chosen = [a for a in ARCHITECTURES if a.replace(".", "") in known]
    # PTX of 9.0 serves what has no code of its own between 9.0 and the newest (Thor is 11.0).
    return [a + "+PTX" if a in ("9.0", chosen[-1]) else a for a in chosen]


def visible_architectures():
    """Return the compute capabilities of the GPUs here that the kernels support, in rising order."""
    if not shutil.which("nvidia-smi"):
        return []
    try:
        listed = output_of("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    except BuildError:
        return []
    found = {tuple(map(int, line.split("."))) for line in re.findall(r"^\d+\.\d$", listed, re.M)}
    return [f"{major}.{minor}" for major, minor in sorted(found) if (major, minor) >= OLDEST_CAPABILITY]


# ---------------------------------------------------------------- commands


class Build:
    """The commands of one build: objects from sources, modules from objects."""

    def __init__(self, folder, with_cuda):
        import pybind11  # noqa: PLC0415 (its absence is a BuildError, not the end)

        self.folder = folder
        self.objects = {}  # object: its command
        self.modules = {}  # module: (its command, its objects)
        self.facts = {"CUDA": None, "ARCHITECTURES": None}
        self.cxx = find_compiler()
        flags = shlex.split(os.environ.get("CXXFLAGS", "") + " " + os.environ.get("CFLAGS", ""))
        includes = [ROOT / "csrc", sysconfig.get_path("include"), pybind11.get_include()]
        # Without NDEBUG, pybind11 checks the GIL at every change of a reference count: twice the host time.
        self.flags = ["-O3", "-DNDEBUG", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-pthread", *flags]
        self.flags += [f"-I{path}" for path in includes]
        self.link_flags = ["-shared", "-pthread", "-ldl"]
        if PLATFORM.startswith("macosx"):  # Python is found when the module is loaded
            self.link_flags += ["-undefined", "dynamic_lookup"]
        else:
            exports = ROOT / "csrc" / "python" / "exports.map"
            self.link_flags += [f"-Wl,--version-script={exports}", *([] if "-g" in flags else ["-Wl,-s"])]
        self.link_flags += shlex.split(os.environ.get("LDFLAGS", ""))
        if with_cuda:
            self._add_cuda()

    def _add_cuda(self):
        toolkit = find_toolkit()
        self.nvcc = str(toolkit / "bin" / "nvcc")
        version = re.findall(r"release ([\d.]+)", output_of(self.nvcc, "--version"))
        architectures = cuda_architectures(self.nvcc)
        self.facts = {"CUDA": version[0] if version else "?", "ARCHITECTURES": ";".join(architectures)}
        self.nvcc_flags = ["-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden", f"-I{ROOT / 'csrc'}"]
        for entry in architectures:
            number, _, ptx = entry.replace(".", "").partition("+")
            codes = f"sm_{number},compute_{number}" if ptx else f"sm_{number}"
            self.nvcc_flags.append(f"-gencode=arch=compute_{number},code=[{codes}]")
        if "--compress-mode" in output_of(self.nvcc, "--help"):
            self.nvcc_flags.append("--compress-mode=size")
        self.flags += ["-DGRADCLIP_EXT_WITH_CUDA", f"-I{toolkit / 'include'}"]
        folders = [f"-L{toolkit / name}" for name in ("lib64", "lib") if (toolkit / name).is_dir()]
        # The static runtime makes one binary fit every torch, whatever runtime that brings.
        is_shared = os.environ.get("GRADCLIP_EXT_CUDART") == "shared"
        self.link_flags += [*folders, *(["-lcudart"] if is_shared else ["-lcudart_static", "-lrt"])]

    def add_module(self, path, patterns):
        """Add a module that is made of the sources that the patterns find."""
        objects = []
        for source in sorted(s for pattern in patterns for s in (ROOT / "csrc").glob(pattern)):
            is_cuda = source.suffix == ".cu"
            target = self.folder / f"{source.relative_to(ROOT / 'csrc').as_posix().replace('/', '_')}.o"
            command = [self.nvcc, *self.nvcc_flags, "-MD"] if is_cuda else [*self.cxx, *self.flags, "-MMD"]
            self.objects[target] = [*command, "-MF", f"{target}.d", "-c", source, "-o", target]
            objects.append(target)
        self.modules[path] = ([*self.cxx, *objects, *self.link_flags, "-o", path], objects)

    def run(self):
        """Run all commands: by ninja, in parallel and only what has changed, or one after the other."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.modules:
            path.parent.mkdir(parents=True, exist_ok=True)
        # pip does not put the scripts of the environment it runs in on PATH.
        ninja = shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))
        if ninja:
            (self.folder / "build.ninja").write_text(self._ninja_file())
            jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
            return self._call([ninja, "-C", self.folder, *jobs])
        for command in [*self.objects.values(), *(command for command, _ in self.modules.values())]:
            self._call(command)

    def _ninja_file(self):
        def line(command):
            return shlex.join(map(str, command)).replace("$", "$$")

        def path(p):
            return re.sub(r"([$ :])", r"$\1", str(p))

        lines = ["rule compile", "  command = $line", "  depfile = $out.d", "  deps = gcc"]
        lines += ["rule link", "  command = $line"]
        for target, command in self.objects.items():
            source = command[command.index("-c") + 1]
            lines += [f"build {path(target)}: compile {path(source)}", f"  line = {line(command)}"]
        for target, (command, objects) in self.modules.items():
            lines += [
                f"build {path(target)}: link {' '.join(map(path, objects))}",
                f"  line = {line(command)}",
            ]
        return "\n".join(lines) + "\n"

    @staticmethod
    def _call(command):
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        if done.returncode:
            print(done.stdout)
            errors = re.findall(r"^.*(?:error|fatal|ERROR).*$", done.stdout, re.M) or ["see its output above"]
            raise BuildError(f"compiling failed: {errors[0].strip()}")


# ---------------------------------------------------------------- setuptools


class BuildPy(build_py):
    """Removes what an earlier build has left, so that nothing stale gets into a wheel."""

    def run(self):
        stale = [Path(self.build_lib) / "gradclip_ext"]
        stale += [ROOT / "gradclip_ext"] if self.editable_mode else []
        for path in (path for folder in stale for name in BUILT for path in folder.glob(name)):
            path.unlink()
        super().run()

    def find_package_modules(self, package, package_dir):
        modules = super().find_package_modules(package, package_dir)
        return [module for module in modules if module[1] != "_build_info"]


class BuildExt(build_ext):
    """Builds the modules, and records beside them what was built and what was not, and why."""

    def run(self):
        asked = asked_mode()
        reasons = {"cuda": None, "cpu": None}
        facts = {"CUDA": None, "ARCHITECTURES": None}
        for mode in ("cuda", "cpu") if asked == "auto" else (asked,):
            try:
                facts = self._build(with_cuda=mode == "cuda")
                break
            except (BuildError, ImportError) as error:
                reasons[mode] = str(error)
                if asked != "auto":
                    sys.exit(f"GRADCLIP_EXT_BUILD={asked} cannot be built: {error}")
                print(f"gradclip_ext: building without {mode}: {error}", file=sys.stderr)
        if asked == "cpu":
            reasons["cuda"] = "GRADCLIP_EXT_BUILD=cpu was asked for"
        facts |= {"CPU_REASON": reasons["cpu"], "CUDA_REASON": reasons["cuda"]}
        target = Path(self.get_ext_fullpath("gradclip_ext._C")).parent / "_build_info.py"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("".join(f"{name} = {value!r}\n" for name, value in facts.items()))

    def _build(self, with_cuda):
        build = Build(Path(self.build_temp).resolve(), with_cuda)
        patterns = ["cpu/*.cpp", "python/*.cpp", *(["python/cuda/*.cpp", "cuda/*.cu"] if with_cuda else [])]
        for extension in self.extensions:
            path = Path(self.get_ext_fullpath(extension.name)).resolve()
            is_testing = extension.name.endswith("._testing")
            build.add_module(path, ["cpu/*.cpp", "testing.cpp"] if is_testing else patterns)
        build.run()
        return build.facts


# ---------------------------------------------------------------- metadata


def metadata():
    """Return what depends on where the repository is, under the names of setuptools.setup()."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    urls = {}
    repository = os.environ.get("GRADCLIP_EXT_REPOSITORY", "").rstrip("/")
    if repository:
        if not re.fullmatch(r"https://[^/]+/[^/]+/[^/]+", repository):
            sys.exit(
                f"GRADCLIP_EXT_REPOSITORY={repository!r} is not an address such as https://github.com/<owner>/<name>"
            )
        version = re.search('"(.+)"', (ROOT / "gradclip_ext" / "_version.py").read_text())[1]
        readme = with_absolute_links(readme, repository, f"v{version}")
        owner, name = repository.split("/")[-2:]
        urls = {
            "Documentation": f"https://{owner.lower()}.github.io/{name}/",
            "Source": repository,
            "Issues": f"{repository}/issues",
            "Changelog": f"{repository}/blob/v{version}/CHANGELOG.md",
        }
    return {
        "long_description": readme,
        "long_description_content_type": "text/markdown",
        "project_urls": urls,
    }


def with_absolute_links(markdown, repository, tag):
    """Return Markdown whose relative links lead to a tag of the repository, for pictures to the raw file."""

    def absolute(link):
        picture, text, target = link.groups()
        file = f"README.md{target}" if target.startswith("#") else target
        return f"{picture}[{text}]({repository}/{'raw' if picture else 'blob'}/{tag}/{file})"

    parts = re.split(r"(^```.*?^```)", markdown, flags=re.DOTALL | re.MULTILINE)
    parts[::2] = [re.sub(r"(!?)\[([^][]*)\]\((?!https?:)([^()\s]+)\)", absolute, part) for part in parts[::2]]
    return "".join(parts)


def extensions():
    if asked_mode() == "none":
        return []
    names = ["_C", "_testing"] if os.environ.get("GRADCLIP_EXT_TESTING") else ["_C"]
    return [setuptools.Extension(f"gradclip_ext.{name}", sources=[]) for name in names]


if __name__ == "__main__":
    setuptools.setup(
        ext_modules=extensions(), cmdclass={"build_py": BuildPy, "build_ext": BuildExt}, **metadata()
    )
