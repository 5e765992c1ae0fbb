#!/usr/bin/env bash
# Runs a command as N processes on this machine, to try several processes without a cluster:
#
#   launch/local.sh 2 train --config=configs/tiny.py --workdir=runs/two
#   DEVICES=4 launch/local.sh 2 train ...      each process with 4 virtual CPU devices (default 1)
#
# A signal goes to all processes. The exit code is the first one that is not 0. DRY_RUN=1, or --dry-run before N, prints
# the commands instead. PYTHON names the interpreter, PORT the port of process 0.
set -euo pipefail

dry_run=${DRY_RUN:-}
if [[ ${1:-} == --dry-run ]]; then
  dry_run=1
  shift
fi
if (($# < 2)) || ! [[ $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: $0 [--dry-run] N COMMAND [FLAG...], as in: $0 2 train --config=configs/tiny.py --workdir=runs/two" >&2
  exit 2
fi
count=$1 name=$2
shift 2

python=${PYTHON:-python3}
port=${PORT:-$((20000 + RANDOM % 12000))}
export JAX_PLATFORMS=cpu
# XLA has one thread per core, and devices that wait for one another in a collective take them all on a small machine.
export NPROC=${NPROC:-$((16 * ${DEVICES:-1}))}
# Processes that share the cores of one machine keep one another waiting for longer than XLA's 40 seconds.
XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=${DEVICES:-1}"
XLA_FLAGS+=" --xla_cpu_collective_call_terminate_timeout_seconds=600 --xla_cpu_collective_timeout_seconds=600"
export XLA_FLAGS

pids=()
# shellcheck disable=SC2317,SC2329  # called by the traps
forward() { kill -"$1" "${pids[@]}" 2>/dev/null || true; }
trap 'forward TERM' TERM
trap 'forward INT' INT

for ((i = 0; i < count; i++)); do
  command=("$python" -m "sedd_jax.$name" "$@"
    --coordinator="127.0.0.1:$port" --num_processes="$count" --process_id="$i")
  if [[ $dry_run ]]; then
    printf 'NPROC=%q XLA_FLAGS=%q JAX_PLATFORMS=cpu' "$NPROC" "$XLA_FLAGS"
    printf ' %q' "${command[@]}"
    echo
  else
    "${command[@]}" &
    pids+=($!)
    echo "process $i is $!" >&2
  fi
done

code=0
for pid in "${pids[@]}"; do
  # A signal interrupts wait, so it is asked again for as long as the process lives.
  while :; do
    this=0
    wait "$pid" || this=$?
    kill -0 "$pid" 2>/dev/null || break
  done
  ((code)) || code=$this
done
exit "$code"
