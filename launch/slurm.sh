#!/usr/bin/env bash
# A training run on a Slurm cluster of GPUs, one process per GPU; jax finds the processes from Slurm's variables.
#
#   sbatch --nodes=4 --gpus-per-node=8 --ntasks-per-node=8 --cpus-per-task=12 launch/slurm.sh \
#     train --config=configs/small.py --workdir=DIR
#
# DIR and the data lie on a file system that all nodes share. Before its time is over, or when it is preempted, the job
# gets SIGTERM, saves, and is queued again; the same command goes on where it stopped. With --dry-run as the first
# argument it prints what it would run. PYTHON names the interpreter.
#SBATCH --job-name=sedd_jax
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@120
# Not --gpus-per-task: it would number every process's GPU 0, and jax picks the GPU by the rank on the node.
set -euo pipefail

dry_run=()
if [[ ${1:-} == --dry-run ]]; then
  dry_run=(echo)
  shift
fi
if (($# < 1)); then
  echo "usage: sbatch [SBATCH OPTION...] $0 [--dry-run] COMMAND [FLAG...]" >&2
  exit 2
fi
name=$1
shift

# Since Slurm 22.05 srun does not take this over from sbatch, and may bind each task to one CPU.
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
code=0
"${dry_run[@]}" srun --kill-on-bad-exit=0 "${PYTHON:-python3}" -m "sedd_jax.$name" "$@" || code=$?
# 143: stopped by SIGTERM, with its state saved. 0: done. 2: bad input. 130: stopped on purpose. All else is a lost
# process (137: killed, perhaps for its memory), and worth another start.
if [[ $code == 143 ]] || [[ ! $code =~ ^(0|2|130)$ && ${SLURM_RESTART_COUNT:-0} -lt ${MAX_RESTARTS:-10} ]]; then
  "${dry_run[@]}" scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
