#!/usr/bin/env bash
set -euo pipefail
# shellcheck source=tpu_scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
  cat <<'USAGE'
create.sh [--spot | --reserved]: creates the TPU at once. If it exists and is READY, says so and does nothing.

Where there is no capacity this fails at once; queue.sh waits for it.

Examples:
  tpu_scripts/create.sh --spot             # cheap, may be taken away at any time: babysit.sh
  tpu_scripts/create.sh --dry-run

  --spot          spot capacity
  --reserved      capacity that the project has reserved
USAGE
}

while (($#)); do
  TAKEN=1
  case $1 in
    --spot | --reserved) tier "$1" ;;
    *) common_option "$@" ;;
  esac
  shift "$TAKEN"
done
begin

tpu_state
if ((!DRY_RUN)); then
  case $STATE in
    ABSENT) ;;
    READY)
      same_type
      say "$TPU_NAME exists and is READY"
      exit 0
      ;;
    CREATING | STARTING | RESTARTING | REIMAGING | REPAIRING)
      die 1 "$TPU_NAME is $STATE: wait, and look with status.sh"
      ;;
    PREEMPTED | TERMINATED | UNKNOWN) die 1 "$TPU_NAME is $STATE: run delete.sh, then create.sh again" ;;
    STOPPED)
      die 1 "$TPU_NAME is STOPPED: gcloud compute tpus tpu-vm start $TPU_NAME ${WHERE[*]}, or delete.sh and create.sh"
      ;;
    *) die 1 "$TPU_NAME is $STATE: wait until it is READY or gone (status.sh)" ;;
  esac
fi

creation_flags
code=0
run_cmd gcloud compute tpus tpu-vm create "$TPU_NAME" "${WHERE[@]}" --accelerator-type="$ACC_GCLOUD" \
  --version="$TPU_RUNTIME" "${TIER[@]}" "${FLAGS[@]}" || code=$?
((code == 0)) ||
  die "$code" "$TPU_NAME was not created (gcloud's exit code $code, its message is above). No capacity: queue.sh" \
    "waits for it. No quota: ask for it for $ACC_GCLOUD in $TPU_ZONE, or take another zone"
if ((DRY_RUN)); then exit 0; fi
tpu_state
[[ $STATE == READY ]] || die 1 "$TPU_NAME was created but is $STATE, not READY: look with status.sh"
say "$TPU_NAME is READY: $ACC_CHIPS chips on $ACC_HOSTS workers. Next: setup.sh"
