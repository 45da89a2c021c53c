#!/usr/bin/env bash
# shellcheck disable=SC2016  # what is in single quotes is for the workers
set -euo pipefail
# shellcheck source=tpu_scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
  cat <<'USAGE'
status.sh [--id ID]: the state of the TPU, of its queued resource, and of each worker's runs.

  running PID     it runs
  exit CODE       it has ended: 0 done, 75 stopped and saved (run again), 2 a mistake in the command, 1 a bug
  dead            it is gone without an exit code: the machine was restarted, or all was killed
  none            it has never been started here

Examples:
  tpu_scripts/status.sh
  watch -n 30 tpu_scripts/status.sh --id main

  --id ID         only this run (default: all)
USAGE
}

only=
while (($#)); do
  TAKEN=1
  case $1 in
    --id)
      run_id "$@"
      only=$2
      ;;
    *) common_option "$@" ;;
  esac
  shift "$TAKEN"
done
begin

queue_state
tpu_state
if ((!DRY_RUN)); then
  if [[ $QUEUE_STATE != ABSENT ]]; then echo "$QUEUE: $QUEUE_STATE"; fi
  echo "$TPU_NAME ($ACC_NAME, $TPU_ZONE): $STATE"
  [[ $STATE == READY ]] || exit 0
fi
worker_list all
if [[ -n $only ]]; then
  on_workers 'asking for states' "echo \"$only: \$(state_of \"\$jobs/$only\")\""
else
  on_workers 'asking for states' 'none=1
for job in "$jobs"/*/; do
  if [[ -d $job ]]; then echo "$(basename "$job"): $(state_of "$job")"; none=0; fi
done
if ((none)); then echo "no runs"; fi'
fi
