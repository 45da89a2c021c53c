#!/usr/bin/env bash
set -euo pipefail
# shellcheck source=tpu_scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
  cat <<'USAGE'
fetch.sh [--to FOLDER]: copies TPU_RUNS_DIR from a worker: configs, metrics, samples, reports, and that worker's logs (in
jobs/). Not checkpoints and models, unless asked for. Afterwards `jrlhf list`, `show` and `compare` work here.

Examples:
  tpu_scripts/fetch.sh
  tpu_scripts/fetch.sh --models --to pod-runs && jrlhf chat --runs-dir pod-runs my-run:ppo

  --to FOLDER       (default: runs)
  --models          finished models and adapters too
  --checkpoints     checkpoints of training too: large
  --worker N        the worker to copy from (default: 0, which writes)
USAGE
}

to=runs worker=0 models=0 checkpoints=0
while (($#)); do
  TAKEN=1
  case $1 in
    --to)
      value_of "$@"
      to=$2
      ;;
    --worker)
      value_of "$@"
      worker=$2
      ;;
    --models) models=1 ;;
    --checkpoints) checkpoints=1 ;;
    *) common_option "$@" ;;
  esac
  shift "$TAKEN"
done
[[ $worker =~ ^[0-9]+$ ]] || die 2 "--worker: expected one worker's number, got $worker"
begin

worker_list "$worker"
excluded=(--exclude=./.jax_cache)
if ((!models)); then excluded+=('--exclude=./stages/*/model' '--exclude=./stages/*/adapter'); fi
if ((!checkpoints)); then excluded+=('--exclude=./stages/*/checkpoints'); fi
script=$(
  printf 'excluded=(%s)\n' "$(printf '%q ' "${excluded[@]}")"
  cat <<'REMOTE'
[[ -d $runs ]] || { echo "there is no folder $runs" >&2; exit 1; }
mkdir -p "$jobs"
code=0 # 1: a file changed while it was read, as the log of a running run does
tar -czf "$HOME/jrlhf-fetch.tgz" "${excluded[@]}" --transform 's|^jrlhf-jobs|jobs|' -C "$runs" . -C "$HOME" jrlhf-jobs ||
  code=$?
((code <= 1)) || exit "$code"
du -h "$HOME/jrlhf-fetch.tgz" | cut -f1
REMOTE
)
on_workers 'packing the runs' "$script"
fetch_tar "$worker" jrlhf-fetch.tgz "$to"
if ((!DRY_RUN)); then say "runs are in $to: jrlhf list --runs-dir $to"; fi
