#!/usr/bin/env bash
# shellcheck disable=SC2016  # what is in single quotes is for the workers
set -euo pipefail
# shellcheck source=tpu_scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

limit=300
usage() {
  cat <<'USAGE'
stop.sh [--id ID] [--limit SECONDS]: stops a run on all workers: SIGTERM to the process that run.sh has recorded, on
which jrlhf saves and ends with 75, and SIGKILL where it has not ended in time. A run that is not running is left alone.

Examples:
  tpu_scripts/stop.sh
  tpu_scripts/stop.sh --id probe --limit 10

  --id ID         name of the run (default: main)
  --limit S       seconds between SIGTERM and SIGKILL: long enough to save (default: 300)
USAGE
}

while (($#)); do
  TAKEN=1
  case $1 in
    --id) run_id "$@" ;;
    --limit)
      value_of "$@"
      whole_number "$1" "$2"
      limit=$2
      ;;
    *) common_option "$@" ;;
  esac
  shift "$TAKEN"
done
begin

script=$(
  printf 'job=$jobs/%q limit=%q\n' "$RUN_ID" "$limit"
  cat <<'REMOTE'
if ! running "$job"; then echo "not running: $(state_of "$job")"; exit 0; fi
kill -TERM "$pid" || ! running "$job"
end=$((SECONDS + limit))
while ((SECONDS < end)); do
  if ! running "$job"; then echo "stopped: $(state_of "$job")"; exit 0; fi
  sleep 0.2
done
kill -KILL "$pid" || ! running "$job"
for ((i = 0; i < 50; i++)); do
  if ! running "$job"; then echo "killed after $limit s: $(state_of "$job")"; exit 0; fi
  sleep 0.2
done
echo "PID $pid is still there after SIGKILL: it hangs in the kernel, restart the worker" >&2
exit 1
REMOTE
)
worker_list all
on_workers 'stopping the run' "$script"
