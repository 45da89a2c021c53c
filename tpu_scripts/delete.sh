#!/usr/bin/env bash
set -euo pipefail
# shellcheck source=tpu_scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
  cat <<'USAGE'
delete.sh [--yes]: deletes the TPU and its queued resource, if there is one. What is on the workers' own disks is lost.

Examples:
  tpu_scripts/fetch.sh && tpu_scripts/delete.sh
  tpu_scripts/delete.sh --yes              # asks nothing

  --yes           do not ask
USAGE
}

yes=0
while (($#)); do
  TAKEN=1
  case $1 in
    --yes) yes=1 ;;
    *) common_option "$@" ;;
  esac
  shift "$TAKEN"
done
begin

queue_state
tpu_state
delete_queue=(gcloud compute tpus queued-resources delete "$QUEUE" "${WHERE[@]}" --force --quiet)
delete_tpu=(gcloud compute tpus tpu-vm delete "$TPU_NAME" "${WHERE[@]}" --quiet)
if ((DRY_RUN)); then
  echo "# if there is a queued resource (its TPU goes with it):"
  show_command "${delete_queue[@]}"
  echo "# if there is a TPU without one:"
  show_command "${delete_tpu[@]}"
  exit 0
fi
if [[ $QUEUE_STATE == ABSENT && $STATE == ABSENT ]]; then
  say "there is no $TPU_NAME and no $QUEUE: nothing to delete"
  exit 0
fi
if ((!yes)); then
  [[ -t 0 ]] || die 2 "delete.sh asks before it deletes, and nobody is there to answer: pass --yes"
  say "This deletes $TPU_NAME ($STATE) and $QUEUE ($QUEUE_STATE) in $TPU_PROJECT, $TPU_ZONE."
  if [[ -z $TPU_STORAGE ]]; then say "Its runs are on its own disks (no TPU_STORAGE): fetch.sh first."; fi
  read -r -p "Type the TPU's name to go on: " answer
  [[ $answer == "$TPU_NAME" ]] || die 1 "nothing was deleted"
fi
if [[ $QUEUE_STATE != ABSENT ]]; then run_cmd "${delete_queue[@]}"; fi
tpu_state
if [[ $STATE != ABSENT ]]; then run_cmd "${delete_tpu[@]}"; fi
say "deleted"
