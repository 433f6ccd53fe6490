#!/usr/bin/env bash
# The paper's protocol on one GPU, in calls of under ten minutes each that go on where the last one stopped.
# Not yet run on a GPU. Usage: bench/paper/lstm/full.sh DATA_DIR [further options]
set -eu
data=$1
shift
while :; do
  status=0
  "${PYTHON:-python}" -m bench.paper.lstm --protocol full --data-dir "$data" --device "${DEVICE:-cuda}" --time-limit 570 \
    --set precision="${PRECISION:-tf32}" "$@" || status=$?
  [ "$status" -eq 3 ] || exit "$status"
  [ -z "${ONE_CALL:-}" ] || exit 3
done
