#!/usr/bin/env bash
# Everything that only a machine with a GPU can tell: builds for the GPU it finds, runs the CUDA tests, the benchmarks
# and the sanitizers. Reports go to $OUT (default bench/results): what each step said, and the benchmarks' tables as
# JSON and Markdown, with machine, versions and commit ($COMMIT where git cannot tell).
# It installs the checkout into the environment of $PYTHON, editable, and needs no network. After $LIMIT seconds
# (default 570) what has not been done fails. EMULATE=1 rehearses without a GPU: the tests, on emulated kernels.
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
out=${OUT:-bench/results}
limit=${LIMIT:-570}
emulate=${EMULATE:-}
export MAX_JOBS=${MAX_JOBS:-$(nproc)}
mkdir -p "$out"
out=$(cd "$out" && pwd)
failed=()

step() { # name, most seconds, command: run it, keep what it says, go on if it fails
  local name=$1 most=$2 left=$((limit - SECONDS))
  shift 2
  printf '\n== %s (%ss)\n' "$name" "$SECONDS"
  if ((left < 1)); then
    echo "no time left" | tee "$out/gpu_$name.txt"
    failed+=("$name")
    return
  fi
  timeout --kill-after=5 "$((left < most ? left : most))" "$@" 2>&1 | tee "$out/gpu_$name.txt" || failed+=("$name")
}

if [ -n "$emulate" ]; then
  export HYPERGRAD_EXT_BUILD=emulate HYPERGRAD_EXT_EMULATE_CUDA=1
else
  # Hopper's own instructions need the architecture with the suffix.
  arch=$("$python" -c '
import torch
major, minor = torch.cuda.get_device_capability()
print(f"{major}.{minor}" + "a" * (major == 9))') || { echo "gpu.sh: torch sees no GPU" >&2; exit 1; }
  export HYPERGRAD_EXT_BUILD=cuda TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$arch}
fi

tests=("$python" -m pytest -q -p no:cacheprovider)
cuda_tests=(tests/test_cuda.py tests/test_cuda_glm.py tests/test_cuda_paths.py tests/test_cuda_graph.py)
step build 300 "$python" -m pip install --no-deps --no-build-isolation -e .
((${#failed[@]} == 0)) || exit 1
step info 60 "$python" -m hypergrad_ext info
step tests 180 "${tests[@]}" -m "cuda and not slow" "${cuda_tests[@]}"
step ops 90 "${tests[@]}" tests/test_ops.py tests/test_steps.py -k cuda

if [ -z "$emulate" ]; then
  for script in bench/gpu_*.py; do
    step "$(basename "$script" .py | sed 's/^gpu_//')" 120 "$python" -m "bench.$(basename "$script" .py)" "$out"
  done

  # Small shapes of every kernel.
  few="not triton and (TestAlignment and bfloat16 or stop_one or TestSoftmaxHessian and bfloat16 and 2049 or test_lstm and float32 or TestMLPProduct and relu or TestGlm and float32 or TestBulkCopies and float32 and product or TestOneLaunch and relu)"
  sanitizer=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
  if [ -x "$sanitizer" ]; then
    for tool in memcheck racecheck synccheck; do
      # Without torch's cache every tensor is an allocation, whose ends the tool knows.
      step "$tool" 100 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" --error-exitcode 1 \
        "${tests[@]}" "${cuda_tests[@]}" -k "$few and not graph"
    done
  else
    echo "no compute-sanitizer on PATH or in the toolkit: sanitizers skipped" | tee "$out/gpu_sanitizers.txt"
    failed+=(sanitizers)
  fi
  step slow 60 "${tests[@]}" -m "cuda and slow" "${cuda_tests[@]}"
fi

((${#failed[@]} == 0)) || { echo "failed: ${failed[*]}"; exit 1; }
echo "all passed; reports in $out"
