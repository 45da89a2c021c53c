#!/usr/bin/env bash
set -euo pipefail
# shellcheck source=tpu_scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

poll=60
pause=10
max_pause=600
max_restarts=50
limit=300
usage() {
  cat <<'USAGE'
babysit.sh [--id ID] [--spot|--reserved] [--queue] -- COMMAND ...: sees a run through to its end.

  no TPU, or preempted, or terminated     deleted, created again (create.sh, or queue.sh), setup.sh, run again
  run ended with 75, was killed, is dead  stopped on all workers, run again under the same id
  run ended with 0 on all workers         done: exit code 0
  run ended with another code             stopped on all workers, last lines of the log, that exit code

Pauses between restarts double up to --max-pause, and begin anew after a run that lasted that long. A run under this id
that is running already is watched, not started. The source is the working tree as it is when babysit.sh begins, also
for a restart days later. Ctrl-C ends the watching, not the run. Without TPU_STORAGE a run begins anew after a preemption.

Examples:
  tpu_scripts/babysit.sh --spot --queue -- jrlhf run experiments/gsm8k/grpo.py --mesh.fsdp 16
  nohup tpu_scripts/babysit.sh --spot -- jrlhf run experiments/hh/helpful_harmless.py >babysit.log 2>&1 &

  --id ID           name of the run (default: main)
  --spot, --reserved    passed on to create.sh or queue.sh
  --queue           queue.sh in place of create.sh
  --max-restarts N  give up after so many restarts (default: 50)
  --poll S          look this often (default: 60)
  --pause S         first pause before a restart (default: 10)
  --max-pause S     longest pause (default: 600)
  --stop-limit S    seconds for other workers to save before they are killed (default: 300)
USAGE
}

how=create
while (($#)); do
  TAKEN=1
  case $1 in
    --id) run_id "$@" ;;
    --spot | --reserved) tier "$1" ;;
    --queue) how=queue ;;
    --poll)
      value_of "$@"
      number "$1" "$2"
      poll=$2
      ;;
    --max-restarts | --pause | --max-pause | --stop-limit)
      value_of "$@"
      whole_number "$1" "$2"
      case $1 in
        --max-restarts) max_restarts=$2 ;;
        --pause) pause=$2 ;;
        --max-pause) max_pause=$2 ;;
        --stop-limit) limit=$2 ;;
      esac
      ;;
    --)
      shift
      break
      ;;
    *) common_option "$@" ;;
  esac
  shift "$TAKEN"
done
(($#)) || die 2 "no command: babysit.sh [options] -- COMMAND ... (babysit.sh --help)"
begin

note() { say "$(date -u +%FT%TZ) babysit: $*"; }

if ((DRY_RUN)); then
  echo "# where there is no TPU, or it was preempted:"
  "$SCRIPTS/delete.sh" --yes --dry-run
  "$SCRIPTS/$how.sh" "${TIER[@]}" --dry-run
  "$SCRIPTS/setup.sh" --dry-run
  echo "# where the run is not running:"
  "$SCRIPTS/run.sh" --id "$RUN_ID" --dry-run -- "$@"
  echo "# every $poll s:"
  tpu_state
  run_states
  exit 0
fi

if ((ACC_HOSTS > 1)) || [[ ${TIER[*]} == --spot ]]; then
  [[ -n $TPU_STORAGE || $TPU_RUNS_DIR == /* ]] ||
    note "warning: no TPU_STORAGE: runs are on the workers' own disks, and what is on them goes with a preempted TPU"
fi
archive=$WORK/source.tgz
"$SCRIPTS/sync.sh" --pack "$archive"

restarts=0 next_pause=$pause
# A restart is due: counts it, waits, gives up after too many.
again() { # WHY
  restarts=$((restarts + 1))
  ((restarts <= max_restarts)) ||
    die 1 "babysit gives up after $max_restarts restarts; the last reason: $1. The log: logs.sh --id $RUN_ID"
  if ((SECONDS - started_at >= max_pause)); then next_pause=$pause; fi
  note "$1; restart $restarts of at most $max_restarts in $next_pause s"
  sleep "$next_pause"
  next_pause=$((next_pause * 2 > max_pause ? max_pause : next_pause * 2))
  started_at=$SECONDS
}

start() {
  "$SCRIPTS/setup.sh" --archive "$archive" && "$SCRIPTS/run.sh" --id "$RUN_ID" -- "$@" || return 1
  started_at=$SECONDS begun=1
}

started_at=$SECONDS
begun=0  # the run was started, or found running, by this babysit.sh: how it ended before is history
silent=0 # looks in a row that got no answer
mixed=0  # looks in a row at which some workers had failed and others ran on
while :; do
  if ! tpu_state; then STATE=unknown; fi
  case $STATE in
    READY) same_type ;;
    STOPPED) die 1 "somebody has stopped $TPU_NAME: start it with gcloud compute tpus tpu-vm start, or delete.sh" ;;
    ABSENT | PREEMPTED | TERMINATED)
      if ((begun)); then again "$TPU_NAME is $STATE"; else note "$TPU_NAME is $STATE"; fi
      if ! { "$SCRIPTS/delete.sh" --yes && "$SCRIPTS/$how.sh" "${TIER[@]}" && start "$@"; }; then
        begun=1
      fi
      continue
      ;;
    *) # on its way to another state, or gcloud gave no answer
      silent=$((silent + 1))
      ((silent <= 60)) || die 1 "$TPU_NAME is $STATE for $silent looks in a row: status.sh"
      sleep "$poll"
      continue
      ;;
  esac

  if ! run_states; then
    silent=$((silent + 1))
    if ((silent > 10)); then
      silent=0
      again 'workers do not answer'
    else
      sleep "$poll"
    fi
    continue
  fi
  silent=0
  runs=0 done_=0 lost=() failed=() absent=0
  for worker in "${!STATES[@]}"; do
    case ${STATES[worker]} in
      running*) runs=$((runs + 1)) ;;
      'exit 0') done_=$((done_ + 1)) ;;
      # 75: stopped and saved. 137 and 143: killed from outside. 134: jax ended it, because process 0 was gone.
      'exit 75' | 'exit 134' | 'exit 137' | 'exit 143' | dead) lost+=("$worker") ;;
      none) absent=$((absent + 1)) ;;
      *) failed+=("$worker") ;;
    esac
  done

  if ((runs == ACC_HOSTS)); then
    ((begun)) || note "run $RUN_ID is running already: watching it"
    begun=1 mixed=0
    sleep "$poll"
  elif ((!begun)); then
    if ((runs)); then "$SCRIPTS/stop.sh" --id "$RUN_ID" --limit "$limit"; fi
    begun=1
    start "$@" || again 'the run could not be started'
  elif ((done_ == ACC_HOSTS)); then
    note "run $RUN_ID is done after $restarts restarts"
    exit 0
  elif ((runs + done_ == ACC_HOSTS)) || ((runs && mixed < 2)); then
    # Some are done, or some have failed just now: the others may be about to.
    if ((runs + done_ < ACC_HOSTS)); then mixed=$((mixed + 1)); fi
    sleep "$poll"
  else
    mixed=0
    if ((runs)); then "$SCRIPTS/stop.sh" --id "$RUN_ID" --limit "$limit"; fi
    # Where one worker was lost the others fail for want of it: their codes say nothing. A user's mistake (2) does.
    for worker in "${failed[@]}"; do
      if ((${#lost[@]} + absent == 0)) || [[ ${STATES[worker]} == 'exit 2' ]]; then
        note "run $RUN_ID ended on worker $worker with ${STATES[worker]}; the end of its log:"
        "$SCRIPTS/logs.sh" --id "$RUN_ID" --worker "$worker" --lines 40 --no-follow >&2
        code=${STATES[worker]#exit }
        die "$code" "run $RUN_ID failed on worker $worker with exit code $code. Mend it, then babysit.sh again"
      fi
    done
    why="it is not there on $absent workers"
    if ((${#lost[@]})); then why="worker ${lost[0]} is ${STATES[${lost[0]}]/#exit/at exit}"; fi
    again "run $RUN_ID: $why"
    start "$@" || note 'the run could not be started'
  fi
done
