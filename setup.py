"""Builds the extension ``hypergrad_ext._C``; all metadata is in pyproject.toml.

``HYPERGRAD_EXT_BUILD`` chooses what is compiled:

    auto (default)  CUDA if this torch has CUDA and a toolkit is found, else C++ for the CPU,
                    else, without a compiler, pure Python; a compile error is an error
    cuda            CUDA, or fail
    cpu             C++ for the CPU, or fail
    none            pure Python
    emulate         for tests: a second module, ``_C_emulated``, whose CUDA kernels run on the CPU
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

MODES = ("auto", "cuda", "cpu", "none", "emulate")
HERE = Path(__file__).parent


def say(message):
    print(f"hypergrad_ext: {message}", file=sys.stderr, flush=True)


def import_torch():
    """The torch of the environment that will run the package, also under pip's build isolation."""
    try:
        import torch
    except ModuleNotFoundError:
        for key in ("platlib", "purelib"):
            path = sysconfig.get_path(key)
            if os.path.isfile(os.path.join(path, "torch", "version.py")) and path not in sys.path:
                sys.path.append(path)
        try:
            import torch
        except ModuleNotFoundError:
            return None
    return torch


def find_cuda_home():
    """Root of a CUDA toolkit that has both nvcc and the runtime headers, or None.

    nvcc on PATH may be a wrapper script elsewhere, so its own folder proves nothing.
    """
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates += [Path(nvcc).resolve().parent.parent] if nvcc else []
    candidates += [Path(p) / "nvidia" / "cu13" for p in sys.path]
    for root in filter(None, candidates):
        if Path(root, "bin", "nvcc").is_file() and Path(root, "include", "cuda_runtime_api.h").is_file():
            return str(root)
    return None


def default_arch_list(home):
    """Architectures to compile for where TORCH_CUDA_ARCH_LIST is unset and no GPU is visible."""
    text = subprocess.run([Path(home, "bin", "nvcc"), "--version"], capture_output=True, text=True, check=True).stdout
    major, minor = map(int, re.search(r"release (\d+)\.(\d+)", text).groups())
    return "8.0;9.0;10.0+PTX" if (major, minor) >= (12, 8) else "8.0;9.0+PTX"


def find_compiler():
    return shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")


def choose(mode, torch):
    """What to build: "cuda", "cpu" or "none", and why."""
    if mode == "none":
        return "none", "HYPERGRAD_EXT_BUILD=none"
    if torch is None:
        reason = (
            "torch is not importable from the build; install torch first and use "
            "`pip install --no-build-isolation .`, or set HYPERGRAD_EXT_BUILD=none"
        )
        if mode == "auto":
            return "none", reason
        raise SystemExit(f"hypergrad_ext: HYPERGRAD_EXT_BUILD={mode}, but {reason}")
    if find_compiler() is None:
        reason = "no C++ compiler found (set CXX, or install g++)"
        if mode == "auto":
            return "none", reason
        raise SystemExit(f"hypergrad_ext: HYPERGRAD_EXT_BUILD={mode}, but {reason}")
    if mode in ("cpu", "emulate"):
        return mode, f"HYPERGRAD_EXT_BUILD={mode}"
    home = find_cuda_home()
    if mode == "cuda":
        if home is None:
            raise SystemExit("hypergrad_ext: HYPERGRAD_EXT_BUILD=cuda, but no CUDA toolkit found; set CUDA_HOME")
        return "cuda", f"HYPERGRAD_EXT_BUILD=cuda, toolkit {home}"
    if torch.version.cuda and home:
        return "cuda", f"torch has CUDA {torch.version.cuda}, toolkit {home}"
    return "cpu", "no CUDA toolkit found" if torch.version.cuda else "this torch has no CUDA"


def emulated_sources():
    """The CUDA files as C++ files, which is what the extension says to torch's build, and the emulator."""
    folder = HERE / "build" / "emulated"
    folder.mkdir(parents=True, exist_ok=True)
    for source in HERE.glob("csrc/cuda/*.cu"):
        text = f'#include "../../csrc/cuda/{source.name}"\n'
        stub = folder / f"{source.stem}.cpp"
        if not stub.exists() or stub.read_text() != text:
            stub.write_text(text)
        yield stub
    yield from HERE.glob("csrc/cuda/emulator/*.cpp")


def find_ninja():
    """Puts ninja on PATH, where torch looks for it, also if this environment is not activated.

    Without it, torch compiles one file after another.
    """
    if shutil.which("ninja"):
        return
    try:
        from ninja import BIN_DIR
    except ModuleNotFoundError:
        say("no ninja found (pip install ninja): one file is compiled at a time")
        return
    os.environ["PATH"] += os.pathsep + BIN_DIR


def build_extension(kind, torch):
    from torch.utils import cpp_extension

    sources = [*HERE.glob("csrc/*.cpp"), *HERE.glob("csrc/cpu/*.cpp")]
    headers = [*HERE.glob("csrc/**/*.h"), *HERE.glob("csrc/**/*.cuh")]
    cxx = ["-O3", "-g0", "-fvisibility=hidden", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"]
    cxx += ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-psabi"]
    flags = {"cxx": cxx}
    link = ["-fopenmp", "-s", "-Wl,--as-needed"]
    sanitized = os.environ.get("HYPERGRAD_EXT_SANITIZE") == "1"
    if sanitized or kind == "emulate":
        # For tests on this machine, which run one set of instructions: the bodies for the others are left out.
        isa = torch.backends.cpu.get_cpu_capability().lower()
        cxx += [f"-DHG_ONLY_ISA={isa if isa in ('avx2', 'avx512') else 'base'}"]
    if sanitized:
        sanitize = "-fsanitize=address,undefined"
        cxx += ["-O1", "-g1", "-fno-omit-frame-pointer", sanitize, "-fno-sanitize-recover=undefined"]
        link = ["-fopenmp", sanitize]
    if kind == "cuda":
        home = find_cuda_home()
        # A torch without CUDA leaves this unset, and is enough to compile and link against.
        cpp_extension.CUDA_HOME = home
        if not torch.cuda.is_available():
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", default_arch_list(home))
        sources += HERE.glob("csrc/cuda/*.cu")
        cxx += ["-DHG_WITH_CUDA"]
        flags["nvcc"] = ["-O3", "-lineinfo", "-DHG_WITH_CUDA", "-Xcompiler=-fvisibility=hidden"]
        # With the static runtime the module needs no CUDA library at import, and loads without a driver.
        runtime = next(Path(home).glob("lib*/libcudart_static.a"), None)
        if runtime is None:
            raise SystemExit(f"hypergrad_ext: HYPERGRAD_EXT_BUILD=cuda, but {home} has no libcudart_static.a")
        link += [str(runtime), "-ldl", "-lrt", "-lpthread"]
    if kind == "emulate":
        # Of the CPU's kernels those that native plans run: the others have a CUDA kernel, which takes their place.
        products = {"panel_gemm", "narrow_gemm", "shared_gemm", "split_multiply", "sweep", "convolution"}
        products |= {"glm_gram", "glm_gram_split"}
        planned = {"plan", *products, "neumann_step", "cg_step", "softmax_hessian", "norms"}
        sources = [s for s in sources if s.parent.name != "cpu" or s.stem in planned]
        sources += emulated_sources()
        # Kernels say where the compiler is to unroll; g++ does not know the word.
        cxx += ["-DHG_WITH_CUDA", "-DHG_EMULATE_CUDA", "-O1", "-g1", "-Wno-unknown-pragmas"]
        cxx += [f"-I{HERE / 'csrc' / 'cuda' / 'emulator'}"]
    return cpp_extension.CppExtension(
        "hypergrad_ext._C_emulated" if kind == "emulate" else "hypergrad_ext._C",
        sources=sorted(str(s.relative_to(HERE)) for s in sources),
        depends=sorted(str(h.relative_to(HERE)) for h in headers),
        extra_compile_args=flags,
        extra_link_args=link,
    )


def build_command():
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def build_extension(self, ext):
            # A library left by an earlier build must not be packed after this one has failed.
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
            # Objects of different builds have the same names.
            self.build_temp = str(Path(self.build_temp) / ext.name)
            super().build_extension(ext)

    return Build


def main():
    mode = os.environ.get("HYPERGRAD_EXT_BUILD", "auto")
    if mode not in MODES:
        raise SystemExit(f"hypergrad_ext: HYPERGRAD_EXT_BUILD must be one of {MODES}, got {mode!r}")
    options = {"package_dir": {"hypergrad_ext.kernels": "kernels"}}
    # Only a command that builds needs a compiler; an sdist is the same on every machine.
    if not {"sdist", "egg_info", "dist_info", "clean"} & set(sys.argv[1:2]):
        torch = None if mode == "none" else import_torch()
        kind, reason = choose(mode, torch)
        say(f"building {kind} ({reason})")
        if kind != "none":
            find_ninja()
            options |= {"ext_modules": [build_extension(kind, torch)], "cmdclass": {"build_ext": build_command()}}
    setup(**options)


main()
