"""The compiled functions of `qna_timm.ops.native`; everything else is in setup.cfg.

They are optional: where one does not compile, the package is installed without it.
"""

import copy
import os
from glob import glob

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FOLDER = "qna_timm/ops/native"
# Of the instruction sets that PyTorch tells apart; the last compiles for any processor.
FLAGS = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma"],
    "avx2": ["-mavx2", "-mfma"],
    "baseline": [],
}
# OpenMP at compilation only: its functions are those of the runtime that PyTorch has loaded.
COMMON = ["-std=c++17", "-O3", "-g0", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"]


class BuildLibraries(build_ext):
    """Compilers side by side: kinds of a library have one source, and objects of their own."""

    def finalize_options(self) -> None:
        super().finalize_options()
        # An option of setup() would not reach an editable installation.
        self.parallel = self.parallel or os.cpu_count() or 1

    def build_extension(self, ext: Extension) -> None:
        own = copy.copy(self)
        own.build_temp = os.path.join(self.build_temp, ext.name)
        build_ext.build_extension(own, ext)


setup(
    cmdclass={"build_ext": BuildLibraries},
    ext_modules=[
        Extension(
            f"{FOLDER.replace('/', '.')}.{name}_{kind}",
            [f"{FOLDER}/{name}.cpp"],
            depends=sorted(glob(f"{FOLDER}/**/*.h", recursive=True)),
            extra_compile_args=COMMON + flags,
            language="c++",
            optional=True,
        )
        for name in ("qna", "span")
        for kind, flags in FLAGS.items()
    ],
)
