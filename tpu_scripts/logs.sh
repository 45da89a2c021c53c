#!/usr/bin/env bash
set -euo pipefail
# shellcheck source=tpu_scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
  cat <<'USAGE'
logs.sh [--id ID] [--worker N|all]: follows a run's log until Ctrl-C, which ends the watching and not the run.

Examples:
  tpu_scripts/logs.sh
  tpu_scripts/logs.sh --worker all --lines 5 --no-follow      # what every worker said last

  --id ID         name of the run (default: main)
  --worker N      a worker's number, several with commas, or all (default: 0)
  --lines N       begin with this many lines (default: 50)
  --no-follow     print them and end
USAGE
}

which=0 lines=50 follow=1
while (($#)); do
  TAKEN=1
  case $1 in
    --id) run_id "$@" ;;
    --worker)
      value_of "$@"
      which=$2
      ;;
    --lines)
      value_of "$@"
      whole_number "$1" "$2"
      lines=$2
      ;;
    --no-follow) follow=0 ;;
    *) common_option "$@" ;;
  esac
  shift "$TAKEN"
done
begin

worker_list "$which"
script="log=\$jobs/$RUN_ID/log
[[ -f \$log ]] || { echo \"no run $RUN_ID here: status.sh lists them\" >&2; exit 1; }"
if ((!follow)); then
  on_workers 'reading the log' "$script"$'\n'"tail -n $lines \"\$log\""
  exit 0
fi
SCRIPT="$(remote_prelude)"$'\n'"$script"$'\n'"exec tail -n $lines -F \"\$log\""
if ((DRY_RUN)); then
  show_ssh "${WORKERS[0]}"
  exit 0
fi
if ((${#WORKERS[@]} == 1)); then
  _ssh "${WORKERS[0]}"
  exit 0
fi
# Ctrl-C does not reach what runs in the background: each is a session of its own, which is ended as a whole.
watching=()
trap 'for leader in "${watching[@]}"; do kill -TERM -- "-$leader"; done; exit 130' INT TERM
for worker in "${WORKERS[@]}"; do
  setsid gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${WHERE[@]}" "${REACH[@]}" --worker="$worker" \
    --command="$SCRIPT" </dev/null > >(sed -u "s/^/[worker $worker] /") 2>&1 &
  watching+=("$!")
done
code=0
for leader in "${watching[@]}"; do wait "$leader" || code=$?; done
exit "$code"
