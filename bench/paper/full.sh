#!/usr/bin/env bash
# The systems at the paper's size on one GPU, in calls of under ten minutes each that go on where the last one stopped.
# Not yet run on a GPU. Usage: bench/paper/full.sh DATA_DIR [options of every call, such as --out DIR]
# DATA_DIR holds MNIST and CIFAR-10. ONE_CALL=1 ends with status 3 after the first call that ran out of time; DEVICE=cpu
# with --quick rehearses.
set -eu
data=$1
shift

run() { # name, data set, seconds after which nothing more is begun
  local status
  while :; do
    status=0
    "${PYTHON:-python}" -m "bench.paper.$1" --data "$2" --data-dir "$data" --device "${DEVICE:-cuda}" \
      --time-limit "$3" "${@:4}" || status=$?
    [ "$status" -eq 3 ] || return "$status"
    [ -z "${ONE_CALL:-}" ] || exit 3
  done
}

# An exact inverse of 25,450 x 25,450 per seed, minutes each, which is not stopped in the middle.
run inverse_hessian mnist 240 "$@"
for set in mnist cifar10; do
  run overfit_validation "$set" 570 "$@"
  run distillation "$set" 570 "$@"
done
# 30 epochs of ResNet-18, about six minutes per arm and seed.
run augmentation cifar10 570 "$@"
# Minutes per seed, not stopped in the middle either.
run hyper_cleaning mnist 400 "$@"
