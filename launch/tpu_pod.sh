#!/usr/bin/env bash
# A training run on a Cloud TPU pod slice, one process per host; jax finds the processes from the TPU's metadata.
#
#   export TPU=my-tpu ZONE=us-central1-a               and PROJECT, if it is not gcloud's default
#   ACCELERATOR=v5litepod-16 VERSION=v2-alpha-tpuv5-lite launch/tpu_pod.sh create     queue for a slice (SPOT=1: spot)
#   launch/tpu_pod.sh setup                            copy this working tree to all hosts and install it there
#   launch/tpu_pod.sh run train --config=configs/small.py --workdir=gs://BUCKET/RUN --config.data.source=...
#   launch/tpu_pod.sh logs | stop | status | delete
#
# `run` goes on in the background of every host and starts again after exit codes that are not final, so a lost host or
# a preempted step costs what came after the last checkpoint. If the slice itself was preempted: create, setup, run.
# --dry-run before the action prints the commands instead. DIR is the folder on the hosts, PYTHON their interpreter.
set -euo pipefail

dry_run=
if [[ ${1:-} == --dry-run ]]; then
  dry_run=1
  shift
fi
action=${1:-}
(($# == 0)) || shift

usage() {
  echo "usage: TPU=NAME ZONE=ZONE $0 [--dry-run] create | setup | run COMMAND [FLAG...] | logs | stop | status | delete" >&2
  exit 2
}
[[ -n ${TPU:-} && -n ${ZONE:-} ]] || usage

where=(--zone="$ZONE")
[[ -z ${PROJECT:-} ]] || where+=(--project="$PROJECT")
dir=${DIR:-sedd_jax}
python=${PYTHON:-python3}

do_it() {
  if [[ $dry_run ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

on_all_hosts() {
  do_it gcloud compute tpus tpu-vm ssh "$TPU" "${where[@]}" --worker=all --command="$1"
}

case $action in
  create)
    spot=()
    [[ -z ${SPOT:-} ]] || spot=(--spot)
    do_it gcloud compute tpus queued-resources create "$TPU" --node-id="$TPU" "${where[@]}" \
      --accelerator-type="${ACCELERATOR:?e.g. v5litepod-16}" --runtime-version="${VERSION:?e.g. v2-alpha-tpuv5-lite}" \
      "${spot[@]}"
    ;;
  setup)
    archive=${TMPDIR:-/tmp}/$TPU-source.tar.gz
    do_it git -C "$(dirname "${BASH_SOURCE[0]}")/.." archive --format=tar.gz --output="$archive" HEAD
    do_it gcloud compute tpus tpu-vm scp "$archive" "$TPU:source.tar.gz" "${where[@]}" --worker=all
    on_all_hosts "mkdir -p $dir && tar -xzf source.tar.gz -C $dir && cd $dir && $python -m venv .venv && \
.venv/bin/pip install -q -r requirements.lock && .venv/bin/pip install -q -e '.[tpu,gcs]'"
    ;;
  run)
    (($#)) || usage
    command=$(printf ' %q' ".venv/bin/python" -m "sedd_jax.$1" "${@:2}")
    # 0: done. 2: bad input. 130, 143: stopped on purpose. All else is a lost process, and worth another start.
    loop="while :; do$command; code=\$?; case \$code in 0|2|130|143) exit \$code;; esac; sleep 20; done"
    on_all_hosts "cd $dir && nohup setsid bash -c $(printf %q "$loop") >> run.log 2>&1 < /dev/null &"
    ;;
  logs) do_it gcloud compute tpus tpu-vm ssh "$TPU" "${where[@]}" --worker=0 --command="tail -n 100 -F $dir/run.log" ;;
  stop) on_all_hosts "pkill -TERM -f 'python -m sedd_jax[.]' || true" ;;
  status) do_it gcloud compute tpus queued-resources describe "$TPU" "${where[@]}" ;;
  delete) do_it gcloud compute tpus queued-resources delete "$TPU" "${where[@]}" --force ;;
  *) usage ;;
esac
