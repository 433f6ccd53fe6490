#!/usr/bin/env bash
# Everything that only a machine with a GPU can tell: builds for the GPU it finds, runs the CUDA tests, the
# sanitizers and the benchmarks. Reports go to $OUT (default bench/results), one file per step.
# It installs the checkout into the environment of $PYTHON, editable, and needs no network. After $LIMIT seconds
# (default 600) what has not been done fails.
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
out=${OUT:-bench/results}
limit=${LIMIT:-600}
mkdir -p "$out"
out=$(cd "$out" && pwd)
failed=()

step() { # name, command: run it, keep what it says, go on if it fails
  local name=$1
  shift
  printf '\n== %s (%ss)\n' "$name" "$SECONDS"
  local left=$((limit - SECONDS))
  timeout --kill-after=5 "$((left > 1 ? left : 1))" "$@" 2>&1 | tee "$out/gpu_$name.txt" || failed+=("$name")
}

# Hopper's own instructions need the architecture with the suffix.
arch=$("$python" -c '
import torch
major, minor = torch.cuda.get_device_capability()
print(f"{major}.{minor}" + "a" * (major == 9))') || { echo "gpu.sh: torch sees no GPU" >&2; exit 1; }
export HYPERGRAD_EXT_BUILD=cuda TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$arch}

step build "$python" -m pip install --no-deps --no-build-isolation -e .
((${#failed[@]} == 0)) || exit 1
step info "$python" -m hypergrad_ext info
step tests "$python" -m pytest -q -m "cuda and not slow" tests
step ops "$python" -m pytest -q tests/test_ops.py -k cuda

if command -v compute-sanitizer >/dev/null; then
  small=("$python" -m pytest -q -p no:cacheprovider tests/test_cuda.py -k "not triton and (TestAlignment and bfloat16 or stop_one or TestSoftmaxHessian and bfloat16 and 2049)")
  for tool in memcheck racecheck synccheck; do
    # Without torch's cache every tensor is an allocation, whose ends the tool knows.
    step "$tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 "${small[@]}"
  done
else
  echo "no compute-sanitizer on PATH: sanitizers skipped"
fi

# One step in device time, every variant in turn, against the bandwidth of a plain copy.
step steps "$python" - "$out" "$(git rev-parse --short HEAD 2>/dev/null || echo unknown)" <<'EOF'
import json, statistics, sys
import torch
from hypergrad_ext import backends, ops, reference

def milliseconds(variants, rounds=20, calls=20):
    times = {name: [] for name in variants}
    for _ in range(rounds + 2):
        for name, run in variants.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(calls):
                run()
            stop.record()
            stop.synchronize()
            times[name].append(start.elapsed_time(stop) / calls)
    return {name: statistics.median(t[2:]) for name, t in times.items()}

def foreach(v, p, hv):
    torch._foreach_sub_(v, hv, alpha=0.01)
    torch._foreach_add_(p, v)
    return torch.stack(torch._foreach_norm(v)).norm()

device = torch.device("cuda")
big = torch.empty(2**28, device=device)
copy = 2 * big.nbytes / milliseconds({"copy": lambda other=torch.empty_like(big): other.copy_(big)})["copy"] / 1e6
print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {copy:.0f} GB/s")
del big
rows = []
for name, sizes in {"150 x 420": [420] * 150, "150 x 5332": [5332] * 150, "1 x 64M": [2**26], "8 x 8M + 1": [2**23 + 1] * 8}.items():
    hv = [torch.randn(n, device=device) for n in sizes]
    v, p = (torch.randn(sum(sizes), device=device) for _ in range(2))
    stats = torch.zeros(2, dtype=torch.float64, device=device)
    views = v.split(sizes), p.split(sizes)
    variants = {"foreach": lambda: foreach(*views, hv)}
    for backend in ("cuda", "triton"):
        if backends.unavailable(backend, "cuda"):
            continue
        kernel = ops.neumann_step_.kernel(device, backend)
        truth, true_stats = [[t.double() for t in x] for x in ([v], [p], hv)], stats.clone()
        reference.neumann_step_(*truth, true_stats, 0.01, 0.0)
        kernel([v], [p], hv, stats, 0.01, 0.0)
        assert float((v - truth[0][0]).norm() / truth[0][0].norm()) < 1e-6 and torch.allclose(stats, true_stats, rtol=1e-6)
        variants[backend] = lambda kernel=kernel: kernel([v], [p], hv, stats, 0.01, 0.0)
    times = milliseconds(variants)
    for variant, ms in times.items():
        gbs = 20 * sum(sizes) / ms / 1e6
        rows.append({"list": name, "variant": variant, "us": 1e3 * ms, "GB/s": gbs, "share of copy": gbs / copy,
                     "x foreach": times["foreach"] / ms})
        print("  ".join(f"{k}={x:.3g}" if isinstance(x, float) else str(x) for k, x in rows[-1].items()))
machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "copy GB/s": copy, "commit": sys.argv[2]}
with open(f"{sys.argv[1]}/gpu_steps.json", "w") as file:
    json.dump({"environment": machine, "rows": rows}, file, indent=1)
EOF

# Benchmarks that only make sense on a GPU.
for script in bench/gpu_*.py; do
  [ ! -e "$script" ] || step "$(basename "$script" .py)" "$python" -m "bench.$(basename "$script" .py)"
done

step slow "$python" -m pytest -q -m "cuda and slow" tests
step bench "$python" -m pytest -q bench -o python_files='bench_*.py' --quick --save-results
[ "$out" -ef bench/results ] || cp bench/results/*.json "$out/"

((${#failed[@]} == 0)) || { echo "failed: ${failed[*]}"; exit 1; }
echo "all passed; reports in $out"
