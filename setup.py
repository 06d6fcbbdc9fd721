"""Build the native CPU kernels: compile `csrc/` once per instruction set into one library without torch headers.

Metadata is in pyproject.toml. A missing or failing compiler does not stop the installation: the package then works
with its other implementations, and `uniref_fast.native.reason()` says so.
"""

import os
import platform
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

FLAGS = ["-O3", "-g0", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"]
AVX512BF16 = [*AVX512, "-mavx512bf16"]
# 16-lane code in AVX2 instructions, for tests: better code would take long to compile. (Expensive: contracts to FMA.)
ON_AVX2 = [*AVX2, "-O1", "-fexpensive-optimizations"]
# Source, name, floats in a vector, flags.
LEVELS = [
    ("csrc/level.cpp", "avx2", 8, AVX2),
    ("csrc/level.cpp", "avx512_on_avx2", 16, ON_AVX2),
    ("csrc/level_pairs.cpp", "avx512bf16_on_avx2", 16, ON_AVX2),
    ("csrc/level.cpp", "avx512", 16, AVX512),
    ("csrc/level_pairs.cpp", "avx512bf16", 16, AVX512BF16),
]

Job = tuple[str, str, int, list[str], list]  # source, level, floats in a vector, flags, macros


class BuildNative(build_ext):
    """Compile one object per (source, level), in parallel."""

    def build_extension(self, ext: Extension) -> None:
        try:
            self._build(ext)
        except Exception as error:
            print(
                f"uniref_fast: the native CPU kernels were not built ({error}).\n"
                "uniref_fast: the installation continues; CPU operations will use plain PyTorch. To have the kernels, "
                "install a C++17 compiler (g++ or clang++) and reinstall.",
                file=sys.stderr,
            )
            raise  # setuptools continues, because the extension is optional

    def _build(self, ext: Extension) -> None:
        openmp = ["-fopenmp"] if self._compiles(["-fopenmp"]) else []
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        levels = [level for level in LEVELS if x86 and self._compiles(level[3])]
        have = [(f"UF_HAVE_{level[1].upper()}", None) for level in levels]
        jobs: list[Job] = [(*level, []) for level in [*levels, ("csrc/level.cpp", "generic", 4, [])]]
        jobs += [("csrc/native.cpp", "", 0, [], have)]

        def compile_one(job: Job) -> list[str]:
            source, level, width, flags, macros = job
            macros = [("UF_LEVEL", level), ("UF_WIDTH", str(width))] if level else macros
            folder = str(Path(self.build_temp, level or "common"))
            return self.compiler.compile(
                [source],
                output_dir=folder,
                macros=macros,
                extra_postargs=[*FLAGS, *openmp, *flags],
                depends=ext.depends,
            )

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [path for paths in pool.map(compile_one, jobs) for path in paths]
        target = self.get_ext_fullpath(ext.name)
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(
            objects, target, extra_postargs=openmp, build_temp=self.build_temp, target_lang="c++"
        )

    def _compiles(self, flags: list[str]) -> bool:
        """Return True if the compiler accepts these flags; one that cannot build an empty function raises later."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text("int probe() { return 0; }\n")
            try:
                self.compiler.compile([str(source)], output_dir=folder, extra_postargs=flags)
            except CompileError:
                return False
            return True


headers = sorted(f"csrc/{path.name}" for path in Path(__file__).parent.glob("csrc/*.h"))
sources = sorted(f"csrc/{path.name}" for path in Path(__file__).parent.glob("csrc/*.cpp"))
setup(
    ext_modules=[Extension("uniref_fast._native", sources, depends=headers, language="c++", optional=True)],
    cmdclass={"build_ext": BuildNative},
)
