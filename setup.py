"""Builds the C++ kernels and, where there is nvcc, the CUDA kernels, through ninja.

No torch is needed, and no extension is required: where one cannot be built the package installs
without it, and `python -m r2vpo_kernels` says what was missing. R2VPO_KERNELS_CUDA=0 in the
environment leaves the CUDA kernels out.
"""

import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")
# Contraction is by hand, so that kernels that share a function give the same bits; infinities and
# NaN are values like any other.
FLAGS = (
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno "
    "-fno-trapping-math -Wall -Wextra -Wno-unknown-warning-option -Wno-psabi "
    "-Wno-maybe-uninitialized"
)
NVCC_FLAGS = "-std=c++17 -O3 -t 0 -fmad=false -cudart static -Xcompiler -fPIC,-fvisibility=hidden"
CUDA_TARGETS = ("80", "90a", "100a")
# One object of the kernels for each instruction set, with its flags; chosen between at run time.
INSTRUCTION_SETS = {"baseline": ""}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS["avx2"] = "-mavx2 -mfma"
    INSTRUCTION_SETS["avx512"] = "-mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl"
# Python's symbols are those of the process that loads an extension: Apple's linker must be told.
LINK_FLAGS = "-undefined dynamic_lookup" if sys.platform == "darwin" else ""

NINJA = """
rule cxx
  command = {cxx} -MMD -MF $out.d {flags} $flags -c $in -o $out
  depfile = $out.d
  deps = gcc
rule nvcc
  command = {nvcc} -MMD -MF $out.d {nvcc_flags} -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = {cxx} -shared {link_flags} $in -o $out
rule nvcc_link
  command = {nvcc} -shared -cudart static $in -o $out
"""


class CannotBuild(Exception):
    pass


def find_compiler():
    """A command and its arguments."""
    given = shlex.split(os.environ.get("CXX", ""))
    commands = [given] if given else [["g++"], ["clang++"], ["c++"]]
    for command in commands:
        if shutil.which(command[0]):
            return command
    raise CannotBuild(
        f"no C++ compiler was found (looked for {', '.join(command[0] for command in commands)})"
    )


def openmp_flags(compiler):
    """What CXXFLAGS and LDFLAGS leave to be added; None where the compiler has no OpenMP."""
    given = [*shlex.split(LINK_FLAGS), *shlex.split(os.environ.get("CXXFLAGS", ""))]
    libraries = shlex.split(os.environ.get("LDFLAGS", ""))
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "openmp.cpp")
        source.write_text("#ifndef _OPENMP\n#error\n#endif\n")
        for flags in ("", "-fopenmp"):
            command = [*compiler, "-shared", "-fPIC", *shlex.split(flags), *given, str(source)]
            command += ["-o", f"{folder}/out", *libraries]
            if subprocess.run(command, capture_output=True).returncode == 0:
                return flags
    return None


def pybind11_headers():
    """Its own, or those that torch brings along."""
    try:
        import pybind11
    except ImportError:
        torch = importlib.util.find_spec("torch")
        if torch is not None and torch.submodule_search_locations:
            folder = Path(torch.submodule_search_locations[0]) / "include"
            if (folder / "pybind11").exists():
                return str(folder)
        raise CannotBuild("the build needs pybind11, which is not installed") from None
    return pybind11.get_include()


def escaped(text):
    """As ninja reads it in a command."""
    return str(text).replace("$", "$$")


def escaped_path(path):
    """As ninja reads it in a list of files; in commands it quotes them itself."""
    return escaped(path).replace(" ", "$ ").replace(":", "$:")


def first_error(output):
    """The line that says most of why a compiler or a linker failed."""
    lines = [line for line in output.splitlines() if line.strip()]
    for words in ("error: ", "cannot find ", "rror"):
        for line in lines:
            if words in line and "linker command failed" not in line and "ld returned" not in line:
                return line
    return lines[-1] if lines else "no output"


def version_of(command, word=""):
    """The first line with `word` of what a compiler says of itself."""
    output = subprocess.run([*command, "--version"], capture_output=True, text=True).stdout
    return next((line for line in output.splitlines() if word in line), command[0])


def backend_of(extension):
    return extension.name.rpartition("._")[2]


def objects_of(extension):
    """(object, rule, source, flags) of each object that an extension is linked from."""
    for source in map(Path, extension.sources):
        stem = "_".join(source.relative_to(CSRC).with_suffix("").parts)
        if source.name == "rows.cpp":
            for name, flags in INSTRUCTION_SETS.items():
                yield f"{stem}_{name}.o", "cxx", source, f"{flags} -DR2VPO_KERNELS=kernels_{name}"
        else:
            yield f"{stem}.o", "nvcc" if source.suffix == ".cu" else "cxx", source, ""


class BuildWithNinja(build_ext):
    def run(self):
        self.report, self.unbuilt = {}, set()
        super().run()
        # Beside the extensions, which an editable installation has in the source tree.
        root = Path() if self.inplace else Path(self.build_lib)
        folder = root / "r2vpo_kernels" / "backends"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build_report.json").write_text(json.dumps(self.report, indent=1) + "\n")
        for ext in self.extensions:
            if backend_of(ext) not in self.unbuilt:
                continue
            # One from an earlier build would not fit these sources.
            (folder / Path(self.get_ext_filename(ext.name)).name).unlink(missing_ok=True)

    def build_extension(self, ext):
        name = backend_of(ext)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            self.report[name] = self.compile(ext, target)
        except (CannotBuild, OSError, subprocess.SubprocessError) as error:
            self.unbuilt.add(name)
            self.report[name] = f"not built: {error}"
        print(f"r2vpo_kernels: the {name} backend: {self.report[name]}", file=sys.stderr)

    def compile(self, ext, target):
        compiler = find_compiler()
        try:
            import ninja  # noqa: F401
        except ImportError:
            raise CannotBuild("the build needs ninja, which is not installed") from None
        includes = [pybind11_headers(), sysconfig.get_path("include")]
        searched = [f"-isystem {shlex.quote(path)}" for path in includes]
        openmp = openmp_flags(compiler)
        flags = [FLAGS, "-Wno-unknown-pragmas" if openmp is None else openmp, *searched]
        link_flags = [LINK_FLAGS, openmp or ""]
        targets = (f"-gencode arch=compute_{t},code=sm_{t}" for t in CUDA_TARGETS)
        nvcc_flags = [NVCC_FLAGS, *targets, *searched]
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        lines = [
            NINJA.format(
                cxx=escaped(shlex.join(compiler)),
                flags=escaped(" ".join([*flags, os.environ.get("CXXFLAGS", "")])),
                nvcc=escaped(shutil.which("nvcc")),
                nvcc_flags=escaped(" ".join(nvcc_flags)),
                link_flags=escaped(" ".join([*link_flags, os.environ.get("LDFLAGS", "")])),
            )
        ]
        objects = list(objects_of(ext))
        for output, rule, source, own in objects:
            lines += [f"build {output}: {rule} {escaped_path(source.resolve())}"]
            lines += [f"  flags = {own}"]
        on_gpu = any(rule == "nvcc" for _, rule, *_ in objects)
        link = "nvcc_link" if on_gpu else "link"
        outputs = " ".join(output for output, *_ in objects)
        lines.append(f"build {escaped_path(target)}: {link} {outputs}")
        script = folder / f"{ext.name}.ninja"
        script.write_text("\n".join(lines) + "\n")
        command = [sys.executable, "-m", "ninja", "-C", str(folder), "-f", script.name]
        run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(run.stdout)
        if run.returncode or not target.exists():
            name = "nvcc" if on_gpu else compiler[0]
            raise CannotBuild(f"{name} failed: {first_error(run.stdout)}")
        version = version_of(["nvcc"], "release") if on_gpu else version_of(compiler)
        built_for = (f"sm_{t}" for t in CUDA_TARGETS) if on_gpu else INSTRUCTION_SETS
        alone = openmp is None and not on_gpu
        threads = " without OpenMP, so with one thread" if alone else ""
        return f"built by {version}{threads} for {', '.join(built_for)}"


def extension(name, sources):
    sources = sorted(str(source) for source in sources)
    return Extension(f"r2vpo_kernels.backends._{name}", sources, optional=True)


extensions = [extension("cpp", CSRC.glob("cpu/*.cpp"))]
if shutil.which("nvcc") and os.environ.get("R2VPO_KERNELS_CUDA") != "0":
    extensions.append(extension("cuda", [*CSRC.glob("cuda/*.cu"), *CSRC.glob("cuda/*.cpp")]))

setup(ext_modules=extensions, cmdclass={"build_ext": BuildWithNinja})
