#!/usr/bin/env bash
# A plan on a Slurm cluster, from a login node:
#   examples/ci/slurm.sh submit sm90 nightly 8 /shared/tonight --gpus=1 --time=04:00:00
# One array task a shard, requeued where its node fails, and a job after all of them that merges. The same line again finishes
# what is left. `moecheck` must be on the PATH of the nodes, the folder on a disk that they share.
set -euo pipefail
case "${1:-}" in
submit)
  if [ $# -lt 5 ]; then echo "wanted: $0 submit PLATFORM TIER SHARDS FOLDER [options of sbatch]" >&2; exit 3; fi
  platform=$2 tier=$3 shards=$4 folder=$(realpath -m "$5")
  shift 5
  mkdir -p "$folder"
  if [ ! -e "$folder/plan.json" ]; then
    moecheck plan --platform "$platform" --tier "$tier" --output "$folder/plan.json"
  fi
  job=$(sbatch --parsable --requeue --array="1-$shards" --output="$folder/shard-%a.log" "$@" "$0" shard "$folder")
  sbatch --dependency="afterany:${job%%;*}" --output="$folder/merge.log" "$0" merge "$folder" # 1, 2 and 3 are merged too
  ;;
shard)
  shard=$SLURM_ARRAY_TASK_ID
  exec moecheck run --plan "$2/plan.json" --shard "$shard/$SLURM_ARRAY_TASK_COUNT" --resume "$2/shard-$shard" --verbose
  ;;
merge)
  exec moecheck merge "$2"/shard-*/ --out "$2/merged-$SLURM_JOB_ID"
  ;;
*)
  echo "wanted: $0 submit PLATFORM TIER SHARDS FOLDER [options of sbatch]" >&2
  exit 3
  ;;
esac
