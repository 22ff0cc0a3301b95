"""Builds tsad._core. Everything else about the package is in pyproject.toml.

Switches (environment variables, "1" is on):
  TSAD_SANITIZE  AddressSanitizer and UndefinedBehaviorSanitizer; run Python under
                 LD_PRELOAD="$(gcc -print-file-name=libasan.so)" with ASAN_OPTIONS=detect_leaks=0
  TSAD_DEBUG     no optimisation, assertions, debug information
  TSAD_WERROR    warnings are errors
  TSAD_CUDA      the CUDA backend's library as well: needs nvcc (cuda/build.py). Not by itself
                 where nvcc is found: six architectures take it half a minute of processor time,
                 in every build, for a backend that has not run on a GPU yet
"""

import os
import runpy
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

import numpy as np
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ABI3 = not sysconfig.get_config_var("Py_GIL_DISABLED")  # no stable ABI without the GIL yet
FOLDERS = ("", "net/", "plan/", "stage/", "cpu/", "python/")


def switched_on(name):
    return os.environ.get(name, "") not in ("", "0")


def macros():
    names = [
        # built against NumPy 2, runs on 1.26 too
        ("NPY_NO_DEPRECATED_API", "NPY_1_23_API_VERSION"),
        ("NPY_TARGET_VERSION", "NPY_1_23_API_VERSION"),
        ("_GNU_SOURCE", None),
    ]
    if ABI3:
        names.append(("Py_LIMITED_API", "0x030A0000"))
    return names


def flags():
    """Compiler and linker flags. No -march: instruction sets are chosen per file, at run time."""
    compile_args = ["-std=gnu11", "-fvisibility=hidden", "-ffp-contract=off", "-pthread"]
    compile_args += ["-Wall", "-Wextra", "-Wstrict-prototypes", "-Wvla"]
    compile_args.append("-Werror=implicit-function-declaration")  # of a newer Python, say
    link_args = ["-pthread"]
    if switched_on("TSAD_DEBUG"):
        compile_args += ["-O0", "-g3", "-UNDEBUG"]
    elif switched_on("TSAD_SANITIZE"):
        compile_args += ["-O1", "-g1", "-UNDEBUG"]  # lines; more of it takes a quarter longer
    else:
        compile_args += ["-O3", "-g0", "-DNDEBUG"]
    if switched_on("TSAD_SANITIZE"):
        sanitize = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer"]
        compile_args += [*sanitize, "-fno-sanitize-recover=undefined"]
        link_args += sanitize
    if switched_on("TSAD_WERROR"):
        compile_args.append("-Werror")
    if sys.platform == "linux":
        link_args.append("-Wl,--exclude-libs,ALL")  # NumPy's static library stays ours alone
    return compile_args, link_args


class ParallelBuildExt(build_ext):
    """Compiles the files of an extension side by side."""

    def run(self):
        if sys.platform != "linux":
            scope = runpy.run_path(str(Path(__file__).parent / "tsad" / "scope.py"))["scope"]
            raise SystemExit(f"system: expected Linux, got {sys.platform} ({scope('systems')})")
        super().run()
        if switched_on("TSAD_CUDA"):
            build = runpy.run_path(str(Path(__file__).parent / "cuda" / "build.py"))["build"]
            build(Path(self.get_ext_fullpath("tsad._core")).parent / "_cuda.so")

    def build_extension(self, ext):
        compile_all = self.compiler.compile

        def compile_parallel(sources, **options):
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                jobs = [pool.submit(compile_all, [source], **options) for source in sources]
                return [file for job in jobs for file in job.result()]

        self.compiler.compile = compile_parallel
        try:
            super().build_extension(ext)
        finally:
            self.compiler.compile = compile_all


compile_args, link_args = flags()
core = Extension(
    "tsad._core",
    sources=sorted(file for folder in FOLDERS for file in glob(f"csrc/{folder}*.c")),
    depends=sorted(glob("csrc/**/*.h", recursive=True)),
    include_dirs=[np.get_include()],
    # random_standard_normal_fill_f: the normal numbers of numpy.random.Generator
    library_dirs=[str(Path(np.__file__).parent / "random" / "lib")],
    libraries=["npyrandom", "m"],
    define_macros=macros(),
    extra_compile_args=compile_args,
    extra_link_args=link_args,
    py_limited_api=ABI3,
)

setup(
    ext_modules=[core],
    cmdclass={"build_ext": ParallelBuildExt},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if ABI3 else {},
)
