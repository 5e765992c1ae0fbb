#!/usr/bin/env bash
# A training run on TPU slices of a GKE cluster, through XPK (pip install xpk), one process per host; jax finds the
# processes from what GKE and JobSet put into the environment.
#
#   export CLUSTER=my-cluster ZONE=us-east5-b         and PROJECT, if it is not gcloud's default
#   export TPU_TYPE=v5litepod-16                      and SLICES, if there is more than one
#   launch/gke.sh create                              make or resize the cluster (SPOT=1, or RESERVATION=name)
#   WORKLOAD=my-run launch/gke.sh run train --config=configs/small.py --workdir=gs://BUCKET/RUN --config.data.source=...
#   WORKLOAD=my-run launch/gke.sh logs | stop
#   launch/gke.sh status | delete
#
# `run` puts the last commit of this repository on top of BASE_IMAGE and installs it at the start of each host, in the
# versions of requirements.lock: an image that has them starts sooner. When a host is lost or the slice is preempted,
# all start again (MAX_RESTARTS times, then `run` it again with a new WORKLOAD) and go on from the last checkpoint; bad
# input is final. `stop` gives the processes GRACE seconds to save. --dry-run before the action prints the commands.
set -euo pipefail

dry_run=
if [[ ${1:-} == --dry-run ]]; then
  dry_run=1
  shift
fi
action=${1:-}
(($# == 0)) || shift

usage() {
  echo "usage: CLUSTER=NAME ZONE=ZONE $0 [--dry-run] create | run COMMAND [FLAG...] | logs | stop | status | delete" >&2
  exit 2
}
[[ -n ${CLUSTER:-} && -n ${ZONE:-} ]] || usage

project=()
[[ -z ${PROJECT:-} ]] || project=(--project="$PROJECT")
where=(--cluster="$CLUSTER" --zone="$ZONE" "${project[@]}")

do_it() {
  if [[ $dry_run ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

case $action in
  create)
    capacity=(--on-demand)
    [[ -z ${SPOT:-} ]] || capacity=(--spot)
    [[ -z ${RESERVATION:-} ]] || capacity=(--reservation="$RESERVATION")
    do_it xpk cluster create "${where[@]}" --tpu-type="${TPU_TYPE:?e.g. v5litepod-16}" --num-slices="${SLICES:-1}" \
      "${capacity[@]}"
    ;;
  run)
    (($#)) || usage
    # A copy without what git ignores: environments, data and runs do not belong into an image.
    source=${TMPDIR:-/tmp}/$CLUSTER-${WORKLOAD:?a name for the run}-source
    do_it rm -rf "$source"
    do_it mkdir -p "$source"
    do_it git -C "$(dirname "${BASH_SOURCE[0]}")/.." archive --format=tar --output="$source.tar" HEAD
    do_it tar -xf "$source.tar" -C "$source"
    # exec, so that SIGTERM reaches the process that can save, and not the shell that XPK starts it from.
    command="pip install -q -r requirements.lock && pip install -q -e '.[tpu,gcs]'"
    command+=" && exec$(printf ' %q' python -m "sedd_jax.$1" "${@:2}")"
    # 1: a process was lost, most likely together with its host. XPK itself restarts after 127 and above, not after 2.
    do_it xpk workload create "${where[@]}" --workload="$WORKLOAD" --tpu-type="${TPU_TYPE:?e.g. v5litepod-16}" \
      --num-slices="${SLICES:-1}" --base-docker-image="${BASE_IMAGE:-python:3.12}" --script-dir="$source" \
      --max-restarts="${MAX_RESTARTS:-50}" --restart-on-exit-codes=1 \
      --termination-grace-period-seconds="${GRACE:-120}" --command="$command"
    ;;
  logs)
    do_it gcloud container clusters get-credentials "$CLUSTER" --location="${ZONE%-*}" "${project[@]}"
    do_it kubectl logs --follow --tail=100 --container=jax-tpu --selector="xpk.google.com/workload=${WORKLOAD:?},\
jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
    ;;
  stop) do_it xpk workload delete "${where[@]}" --workload="${WORKLOAD:?the run to stop}" ;;
  status) do_it xpk workload list "${where[@]}" ;;
  delete) do_it xpk cluster delete "${where[@]}" ;;
  *) usage ;;
esac
