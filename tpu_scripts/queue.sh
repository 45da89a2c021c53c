#!/usr/bin/env bash
set -euo pipefail
# shellcheck source=tpu_scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

limit=86400
poll=30
usage() {
  cat <<'USAGE'
queue.sh [--spot | --reserved] [--limit SECONDS]: asks for the TPU as a queued resource, and waits until it is there.

Run again it goes on waiting in the same place of the queue. It is called TPU_NAME-queue; delete.sh gives it up.
Exit code 124: the time is up, and the request is still in the queue.

Examples:
  tpu_scripts/queue.sh --spot --limit 3600
  tpu_scripts/queue.sh --reserved

  --spot          spot capacity
  --reserved      capacity that the project has reserved
  --limit S       wait no longer than this (default: 86400)
  --poll S        look this often (default: 30)
USAGE
}

while (($#)); do
  TAKEN=1
  case $1 in
    --spot | --reserved) tier "$1" ;;
    --limit)
      value_of "$@"
      whole_number "$1" "$2"
      limit=$2
      ;;
    --poll)
      value_of "$@"
      number "$1" "$2"
      poll=$2
      ;;
    *) common_option "$@" ;;
  esac
  shift "$TAKEN"
done
begin

create() {
  local code=0
  creation_flags
  run_cmd gcloud compute tpus queued-resources create "$QUEUE" "${WHERE[@]}" --node-id="$TPU_NAME" \
    --accelerator-type="$ACC_GCLOUD" --runtime-version="$TPU_RUNTIME" "${TIER[@]}" "${FLAGS[@]}" || code=$?
  ((code == 0)) || die "$code" "$QUEUE was not created (gcloud's exit code $code, its message is above)"
}

queue_state
if ((DRY_RUN)); then
  create
  echo "# then, every $poll s and for at most $limit s, until it prints ACTIVE:"
  queue_state
  tpu_state
  exit 0
fi
if [[ $QUEUE_STATE == ABSENT ]]; then
  tpu_state
  if [[ $STATE == READY ]]; then
    same_type
    say "$TPU_NAME exists and is READY; it was not asked for by a queue"
    exit 0
  fi
  [[ $STATE == ABSENT ]] || die 1 "$TPU_NAME is $STATE, and no queue asked for it: delete.sh first"
  create
  queue_state
fi

last=
while :; do
  [[ $QUEUE_STATE == "$last" ]] || say "$(date +%H:%M:%S) $QUEUE is $QUEUE_STATE"
  last=$QUEUE_STATE
  case $QUEUE_STATE in
    ACTIVE)
      tpu_state
      if [[ $STATE == READY ]]; then
        same_type
        say "$TPU_NAME is READY: $ACC_CHIPS chips on $ACC_HOSTS workers. Next: setup.sh"
        exit 0
      fi
      [[ $STATE != PREEMPTED && $STATE != TERMINATED ]] ||
        die 1 "$QUEUE is ACTIVE, but $TPU_NAME is $STATE: delete.sh, then queue.sh again"
      ;;
    FAILED) die 1 "$QUEUE FAILED: gcloud compute tpus queued-resources describe $QUEUE ${WHERE[*]} says why;" \
      "then delete.sh, and queue.sh again" ;;
    SUSPENDING | SUSPENDED) die 1 "$QUEUE is $QUEUE_STATE (the TPU was taken away): delete.sh, then queue.sh again" ;;
    ABSENT) die 1 "$QUEUE is gone: somebody has deleted it" ;;
    # ACCEPTED, WAITING_FOR_RESOURCES, CREATING, PROVISIONING, DELETING: it will be something else
    *) ;;
  esac
  if ((SECONDS >= limit)); then
    die 124 "$QUEUE is still $QUEUE_STATE after $limit s. queue.sh goes on waiting, delete.sh gives the place up"
  fi
  sleep "$poll"
  queue_state
done
