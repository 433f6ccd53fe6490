#!/usr/bin/env bash
# nvcc for bench/cuda_report.py: what the assembler says of the kernels is kept beside the object.
object=
for ((i = 1; i < $#; ++i)); do
  [ "${!i}" != -o ] || { next=$((i + 1)) && object=${!next}; }
done
"$HYPERGRAD_EXT_NVCC" -Xptxas=-v "$@" >"$object.ptxas" 2>&1 || { cat "$object.ptxas" >&2; exit 1; }
