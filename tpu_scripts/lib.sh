# shellcheck shell=bash
# What the scripts share: options, gcloud, and running a bash script on workers. Sourced, never run.
# shellcheck disable=SC2034  # what is set here is read by the scripts
set -euo pipefail

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "error: bash 4.4 or later is needed; this is $BASH_VERSION (on a Mac: brew install bash)" >&2
  exit 2
fi

SCRIPTS=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=tpu_scripts/env.sh
. "$SCRIPTS/env.sh"

DRY_RUN=0
CONFIG=
RUN_ID=main
TAKEN=1
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT

COMMON_OPTIONS='  --config FILE   settings (default: ~/.config/jrlhf/tpu.env; env.sh --help)
  --dry-run       print the commands, run none of them
  --help          this text'

# An option that every script has; how many words it took is in TAKEN.
common_option() {
  TAKEN=1
  case $1 in
    -h | --help)
      usage
      printf '%s\n' "$COMMON_OPTIONS"
      exit 0
      ;;
    --dry-run) DRY_RUN=1 ;;
    --config)
      value_of "$@"
      CONFIG=$2
      ;;
    *) die 2 "unknown option $1 ($(basename "$0") --help)" ;;
  esac
}

# An option's value is there; for `shift "$TAKEN"`.
value_of() {
  if (($# < 2)) || [[ -z $2 ]]; then die 2 "$1: a value is missing ($(basename "$0") --help)"; fi
  TAKEN=2
}

whole_number() { # OPTION VALUE
  [[ $2 =~ ^[0-9]+$ ]] || die 2 "$1: expected a whole number, got $2"
}

number() { # OPTION VALUE
  [[ $2 =~ ^[0-9]+(\.[0-9]+)?$ ]] || die 2 "$1: expected a number of seconds, got $2"
}

run_id() { # --id VALUE: sets RUN_ID
  value_of "$@"
  [[ $2 =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ ]] || die 2 "--id: letters, digits, '.', '_' and '-' are allowed, got $2"
  RUN_ID=$2
}

TIER=()
tier() { # --spot|--reserved: sets TIER
  ((${#TIER[@]} == 0)) || die 2 "--spot and --reserved: choose one"
  TIER=("$1")
}

# After the options: settings, and whether there is a gcloud.
begin() {
  load_config "$CONFIG"
  WHERE=(--project="$TPU_PROJECT" --zone="$TPU_ZONE")
  REACH=()
  if ((TPU_INTERNAL_IP)); then REACH=(--internal-ip); fi
  QUEUE=$TPU_NAME-queue
  ((DRY_RUN)) || command -v gcloud >/dev/null ||
    die 2 "gcloud is not installed: install the Google Cloud CLI, then run gcloud auth login"
}

say() { printf '%s\n' "$*" >&2; }

show_command() {
  local words
  printf -v words ' %q' "$@"
  if ((DRY_RUN)); then printf '+%s\n' "$words"; else printf '+%s\n' "$words" >&2; fi
}

# Runs a command, or in a dry run only shows it.
run_cmd() {
  show_command "$@"
  if ((!DRY_RUN)); then "$@"; fi
}

# --- the TPU and its queued resource ------------------------------------------------------------------------

# Runs gcloud's describe with a format: sets DESCRIBED, to ABSENT where there is none. Fails, having said why, where
# gcloud does for another reason: a state that is not known is not a TPU that is not there.
describe() { # tpu-vm|queued-resources NAME FORMAT
  local command=(gcloud compute tpus "$1" describe "$2" "${WHERE[@]}" --format="$3") code=0
  if ((DRY_RUN)); then
    show_command "${command[@]}"
    DESCRIBED=
    return
  fi
  DESCRIBED=$("${command[@]}" 2>"$WORK/describe") || code=$?
  if ((code == 0)); then return; fi
  if grep -q NOT_FOUND "$WORK/describe"; then
    DESCRIBED=ABSENT
    return
  fi
  cat "$WORK/describe" >&2
  say "error: gcloud could not say what state $2 is in (exit code $code)"
  return 1
}

tpu_state() { # sets STATE and TYPE (accelerator)
  describe tpu-vm "$TPU_NAME" 'value(state,acceleratorType)' || return 1
  TYPE=
  read -r STATE TYPE <<<"$DESCRIBED" # gcloud may give the type as a path
  TYPE=${TYPE##*/}
}

queue_state() { # sets QUEUE_STATE
  describe queued-resources "$QUEUE" 'value(state.state)' || return 1
  QUEUE_STATE=$DESCRIBED
}

creation_flags() { # sets FLAGS: what create.sh and queue.sh pass on alike
  FLAGS=()
  if [[ -n $TPU_NETWORK ]]; then FLAGS+=(--network="$TPU_NETWORK"); fi
  if [[ -n $TPU_SUBNETWORK ]]; then FLAGS+=(--subnetwork="$TPU_SUBNETWORK"); fi
  if [[ -n $TPU_SERVICE_ACCOUNT ]]; then FLAGS+=(--service-account="$TPU_SERVICE_ACCOUNT"); fi
  if ((TPU_INTERNAL_IP)); then FLAGS+=(--internal-ips); fi
}

same_type() { # the TPU that exists is of the type that was asked for
  [[ -z $TYPE || $TYPE == "$ACC_GCLOUD" ]] ||
    die 1 "$TPU_NAME exists as $TYPE, and TPU_ACCELERATOR is $ACC_GCLOUD: delete.sh first, or choose another TPU_NAME"
}

# --- workers ------------------------------------------------------------------------------------------------

# What begins every script that runs on a worker. A process is known by its number and its start time: after a reboot
# the number may be another's.
remote_prelude() {
  printf 'set -euo pipefail\nruns=%q\n' "$TPU_RUNS_DIR"
  cat <<'REMOTE'
[[ $runs == /* ]] || runs=$HOME/$runs
src=$HOME/jrlhf venv=$HOME/jrlhf-venv jobs=$HOME/jrlhf-jobs
started() { # PID: when it started; fails where it has ended
  local stat
  stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
  set -- ${stat##*) }
  [[ $1 != Z ]] && echo "${20}"
}
running() { # JOB: sets pid, and launcher, which waits for it and writes down how it ended
  local start now
  [[ -f $1/pid ]] && read -r pid start launcher <"$1/pid" && now=$(started "$pid") && [[ $now == "$start" ]]
}
state_of() { # JOB
  if running "$1"; then echo "running $pid"; return; fi
  for ((i = 0; i < 50; i++)); do # it may have ended just now
    if [[ -f $1/exit || ! -f $1/pid ]] || ! started "$launcher" >/dev/null; then break; fi
    sleep 0.1
  done
  if [[ -f $1/exit ]]; then echo "exit $(cat "$1/exit")"
  elif [[ -f $1/pid ]]; then echo dead
  else echo none; fi
}
REMOTE
}

worker_list() { # all, or numbers with commas: sets WORKERS
  local worker
  if [[ $1 == all ]]; then
    mapfile -t WORKERS < <(seq 0 $((ACC_HOSTS - 1)))
    return
  fi
  IFS=, read -ra WORKERS <<<"$1"
  for worker in "${WORKERS[@]}"; do
    if ! [[ $worker =~ ^[0-9]+$ ]] || ((worker >= ACC_HOSTS)); then
      die 2 "--worker: expected all, or numbers below $ACC_HOSTS ($ACC_NAME has $ACC_HOSTS workers), got $1"
    fi
  done
}

# Calls `FUNCTION WORKER` for each of WORKERS, TPU_PARALLEL at a time. Leaves $WORK/N.out, N.err and N.rc, and the
# workers with an exit code other than 0 in FAILED.
each_worker() { # FUNCTION
  local worker first=1
  FAILED=()
  for worker in "${WORKERS[@]}"; do
    while (($(jobs -rp | wc -l) >= TPU_PARALLEL)); do
      if ! wait -n; then :; fi # how a worker's job ended is in its files
    done
    _worker_job "$1" "$worker" &
    # gcloud makes the ssh key when there is none: one of them at a time.
    if ((first)) && [[ ! -e $HOME/.ssh/google_compute_engine ]]; then wait; fi
    first=0
  done
  wait
  for worker in "${WORKERS[@]}"; do
    if (($(<"$WORK/$worker.rc"))); then FAILED+=("$worker"); fi
  done
}

_worker_job() { # always succeeds: what happened is in the files
  local code=0
  "$1" "$2" >"$WORK/$2.out" 2>"$WORK/$2.err" </dev/null || code=$?
  echo "$code" >"$WORK/$2.rc"
}

_ssh() { # WORKER, SCRIPT being set
  gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${WHERE[@]}" "${REACH[@]}" --worker="$1" --command="$SCRIPT"
}

# Runs a bash script on WORKERS and prints nothing; see each_worker.
gather() { # SCRIPT
  SCRIPT="$(remote_prelude)"$'\n'"$1"
  if ((DRY_RUN)); then
    show_ssh "${WORKERS[0]}"
    return
  fi
  each_worker _ssh
}

show_ssh() { # WORKER: the command, to be read and to be pasted
  local words
  printf -v words ' %q' gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${WHERE[@]}" "${REACH[@]}" --worker="$1"
  printf "+%s --command=\"\$(cat <<'REMOTE_SCRIPT'\n%s\nREMOTE_SCRIPT\n)\"\n" "$words" "$SCRIPT"
  if ((${#WORKERS[@]} > 1)); then echo "# and the same for --worker=${WORKERS[1]} to ${WORKERS[-1]}"; fi
}

# Says which workers failed and how; fails if any did.
report_failed() { # WHAT
  local worker
  ((${#FAILED[@]})) || return 0
  for worker in "${FAILED[@]}"; do
    say "worker $worker: $1 failed with exit code $(<"$WORK/$worker.rc"):"
    tail -n 20 "$WORK/$worker.err" | sed "s/^/  /" >&2
  done
  say "error: $1 failed on ${#FAILED[@]} of ${#WORKERS[@]} workers of $TPU_NAME: ${FAILED[*]}"
  return 1
}

# Runs a bash script on WORKERS, prints what each printed, and fails, naming them, where it failed on some.
on_workers() { # WHAT SCRIPT
  local worker
  gather "$2"
  if ((DRY_RUN)); then return; fi
  for worker in "${WORKERS[@]}"; do sed "s/^/[worker $worker] /" "$WORK/$worker.out"; done
  report_failed "$1"
}

# Each worker's `state_of` the run RUN_ID: sets STATES, by worker. Fails where a worker gave no answer.
run_states() {
  local worker
  worker_list all
  gather "state_of \"\$jobs/$RUN_ID\""
  STATES=()
  if ((DRY_RUN)); then return; fi
  report_failed 'asking for the state of the run' || return 1
  for worker in "${WORKERS[@]}"; do STATES[worker]=$(<"$WORK/$worker.out"); done
}

_send() { # WORKER, SENT (local file) and AS (name in the home folder) being set
  gcloud compute tpus tpu-vm scp "$SENT" "$TPU_NAME:$AS" "${WHERE[@]}" "${REACH[@]}" --worker="$1"
}

send_file() { # LOCAL-FILE NAME: to the home folders of WORKERS
  SENT=$1 AS=$2
  if ((DRY_RUN)); then
    show_command gcloud compute tpus tpu-vm scp "$1" "$TPU_NAME:$2" "${WHERE[@]}" "${REACH[@]}" --worker="${WORKERS[0]}"
    if ((${#WORKERS[@]} > 1)); then echo "# and the same for --worker=${WORKERS[1]} to ${WORKERS[-1]}"; fi
    return
  fi
  each_worker _send
  report_failed "copying $(basename "$1")"
}

# Fetches a tar file from a worker's home folder, unpacks it into a local folder and removes it there.
fetch_tar() { # WORKER NAME FOLDER
  run_cmd gcloud compute tpus tpu-vm scp "$TPU_NAME:$2" "$WORK/$2" "${WHERE[@]}" "${REACH[@]}" --worker="$1"
  run_cmd mkdir -p "$3"
  run_cmd tar -xzf "$WORK/$2" -C "$3"
  worker_list "$1"
  on_workers "removing $2" "rm -f \"\$HOME/$2\""
}
