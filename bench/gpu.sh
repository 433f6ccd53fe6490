#!/usr/bin/env bash
# Everything that only a machine with a GPU can tell: builds for the GPU it finds, runs the CUDA tests, the benchmarks
# and the sanitizers. Reports go to $OUT (default bench/results): what each step said, and the benchmarks' tables as
# JSON and Markdown, with machine, versions and commit ($COMMIT where git cannot tell). Where only a few files come back
# from the machine, $BUNDLE (a .tgz outside $OUT) holds all reports, packed again after every step.
# It installs the checkout into the environment of $PYTHON, editable, and needs no network. $MAX_JOBS processes (one per
# core by default) compile, and test where pytest-xdist is installed. Our own kernels come first, Triton's last: after
# $LIMIT seconds (default 570) what has not been done fails. EMULATE=1 rehearses without a GPU: the tests, on emulated
# kernels.
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
out=${OUT:-bench/results}
limit=${LIMIT:-570}
emulate=${EMULATE:-}
export MAX_JOBS=${MAX_JOBS:-$(nproc)}
# A step that is stopped has said all it knows.
export PYTHONUNBUFFERED=1
# torch's matrix products refuse to run in deterministic mode without it.
export CUBLAS_WORKSPACE_CONFIG=:4096:8
mkdir -p "$out"
out=$(cd "$out" && pwd)
failed=()

step() { # name, most seconds, command: run it, keep what it says, go on if it fails; stopped, it says where it was
  local name=$1 most=$2 left=$((limit - SECONDS))
  shift 2
  printf '\n== %s (%ss)\n' "$name" "$SECONDS"
  if ((left < 1)); then
    echo "no time left" | tee "$out/gpu_$name.txt"
    failed+=("$name")
    return
  fi
  # timeout interrupts its child, and once more all of its group. The child is a shell, so that Python hears it once: a
  # second one would cut off what it says at the first. In the background all are deaf to it if not told otherwise.
  timeout --verbose --signal=INT --kill-after=15 "$((left < most ? left : most))" \
    env --default-signal=INT bash -c 'trap : INT; "$@"' "$name" "$@" 2>&1 |
    tee "$out/gpu_$name.txt" || failed+=("$name")
  [ -z "${BUNDLE:-}" ] || tar -czf "$BUNDLE" -C "$out" .
}

if [ -n "$emulate" ]; then
  device=cpu
  export HYPERGRAD_EXT_BUILD=emulate HYPERGRAD_EXT_EMULATE_CUDA=1
else
  device=cuda
  # Hopper's own instructions need the architecture with the suffix.
  arch=$("$python" -c '
import torch
major, minor = torch.cuda.get_device_capability()
print(f"{major}.{minor}" + "a" * (major == 9))') || { echo "gpu.sh: torch sees no GPU" >&2; exit 1; }
  export HYPERGRAD_EXT_BUILD=cuda TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$arch}
fi

# Older ones do not understand pyproject.toml, and say so at length.
"$python" -c 'import setuptools, sys; sys.exit(int(setuptools.__version__.split(".")[0]) < 77)' ||
  { echo "gpu.sh: the build needs setuptools >= 77 in the environment of $python" >&2; exit 1; }

tests=("$python" -m pytest -q -p no:cacheprovider -o faulthandler_timeout=40)
parallel=("${tests[@]}")
if "$python" -c 'import xdist' 2>/dev/null; then
  parallel+=(-n "$((MAX_JOBS < 12 ? MAX_JOBS : 12))" --dist worksteal)
fi
cuda_tests=(tests/test_cuda_paths.py tests/test_cuda_glm.py tests/test_cuda_graph.py tests/test_cuda.py)
step build 200 "$python" -m pip install --no-index --disable-pip-version-check --no-deps --no-build-isolation -e .
# Without our kernels the tests would skip what they cannot run, and pass.
step loads 30 "$python" -c '
import sys
from hypergrad_ext import backends
sys.exit(backends.unavailable("cuda", sys.argv[1]) or 0)' "$device"
((${#failed[@]} == 0)) || exit 1
step info 30 "$python" -m hypergrad_ext info
step tests 150 "${parallel[@]}" -m cuda -k "not triton" "${cuda_tests[@]}"
# Emulated, the compiled kernels go by the name of those on the CPU.
step ops 60 "${parallel[@]}" -k "${emulate:+cpp or }cuda and not triton" tests/test_ops.py tests/test_steps.py

if [ -z "$emulate" ]; then
  for bench in "steps 40" "glm 90" "mlp 90" "engines 75"; do
    read -r name most <<<"$bench"
    step "$name" "$most" "$python" -m "bench.gpu_$name" "$out"
  done

  # Small shapes of every kernel.
  few="not triton and not 20000 and not 70000 and (TestAlignment and bfloat16 or stop_one or TestSoftmaxHessian and bfloat16 and 2049 or test_lstm and float32 or TestMLPProduct and relu or TestGlm and float32 or TestBulkCopies and float32 and product or TestOneLaunch and relu)"
  sanitizer=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
  if [ -x "$sanitizer" ]; then
    for check in "memcheck 70" "racecheck 70" "synccheck 40"; do
      read -r tool most <<<"$check"
      # Without torch's cache every tensor is an allocation, whose ends the tool knows. Only our kernels are watched:
      # this is how the names of what is in hg::cuda begin.
      step "$tool" "$most" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" --error-exitcode 1 \
        --kernel-name kns=2hg4cuda "${tests[@]}" "${cuda_tests[@]}" -k "$few and not graph"
    done
  else
    echo "no compute-sanitizer on PATH or in the toolkit: sanitizers skipped" | tee "$out/gpu_sanitizers.txt"
    failed+=(sanitizers)
  fi
  step triton 120 "${parallel[@]}" -m "" -k "cuda and triton" "${cuda_tests[@]}" tests/test_steps.py
fi

((${#failed[@]} == 0)) || { echo "failed: ${failed[*]}"; exit 1; }
echo "all passed; reports in $out"
