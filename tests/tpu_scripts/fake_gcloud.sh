#!/usr/bin/env bash
# A gcloud that keeps its TPUs in a folder: $FAKE_CLOUD. In bash, because it is started hundreds of times.
#
# `calls` records the arguments of every call, each ended by \x1f, a call by \x1e. `tpu` holds a TPU's state and type,
# `queue` the states that a queued resource goes through, one at each look. A worker is a folder `worker-N`, the home
# folder in which commands that are sent to it are really run, with `bin` before the PATH. Deleting a TPU kills what runs
# on its workers and removes them.
#
# $FAKE_FAIL has a line `WORD,WORD|NTH|CODE|MESSAGE` for each failure: the NTH call that has all these words (0: every
# one) prints the message to stderr and ends with CODE. A flag that gcloud does not have is an error.
set -euo pipefail

fail() { # CODE MESSAGE
  printf '%s\n' "$2" >&2
  exit "$1"
}

{ printf '%s\x1f' "$@"; printf '\x1e'; } >>"$FAKE_CLOUD/calls"
number=0
while IFS='|' read -r words nth code message; do
  number=$((number + 1))
  [[ -n $words ]] || continue
  for word in ${words//,/ }; do
    for argument in "$@"; do [[ $argument != "$word" ]] || continue 2; done
    continue 2
  done
  echo >>"$FAKE_CLOUD/matched-$number"
  ((nth != 0 && nth != $(wc -l <"$FAKE_CLOUD/matched-$number"))) || fail "$code" "$message"
done <<<"${FAKE_FAIL-}"

network=' --network --subnetwork --service-account --internal-ips --spot --reserved --accelerator-type '
case "$1 $2 $3 $4" in
  'compute tpus tpu-vm create') known="$network --version " ;;
  'compute tpus queued-resources create') known="$network --node-id --runtime-version " ;;
  'compute tpus '*' describe') known=' --format ' ;;
  'compute tpus tpu-vm delete') known=' --quiet ' ;;
  'compute tpus queued-resources delete') known=' --force --quiet ' ;;
  'compute tpus tpu-vm ssh') known=' --worker --internal-ip --command ' ;;
  'compute tpus tpu-vm scp') known=' --worker --internal-ip ' ;;
  *) fail 2 "ERROR: (gcloud) Invalid choice: $1 $2 $3 $4" ;;
esac
kind=$3 verb=$4
shift 4
names=()
declare -A flags=()
for argument in "$@"; do
  case $argument in
    --*)
      flag=${argument%%=*}
      [[ "$known --project --zone " == *" $flag "* ]] || fail 2 "ERROR: unrecognized arguments: $argument"
      flags[$flag]=${argument#*=}
      ;;
    *) names+=("$argument") ;;
  esac
done
[[ -n ${flags[--project]-} && -n ${flags[--zone]-} ]] || fail 1 'ERROR: project or zone is not set'

vanish() {
  for file in "$FAKE_CLOUD"/worker-*/jrlhf-jobs/*/pid; do
    if [[ -f $file ]]; then
      read -r pid _ <"$file"
      # run.sh starts a session for what it runs: it is ended as a whole. It may have ended by itself.
      group=$(ps -o pgid= -p "$pid" | tr -d ' ') && kill -KILL -- "-$group"
    fi
  done
  rm -rf "$FAKE_CLOUD"/worker-* "$FAKE_CLOUD/tpu"
}

to_worker() {
  [[ -f $FAKE_CLOUD/tpu && $(<"$FAKE_CLOUD/tpu") == READY* ]] || fail 255 'ssh: port 22: Connection timed out'
  home=$FAKE_CLOUD/worker-${flags[--worker]}
  mkdir -p "$home"
}

missing() {
  [[ -f $FAKE_CLOUD/$1 ]] || fail 1 "ERROR: (gcloud.compute.tpus.$kind.describe) NOT_FOUND: '${names[0]}' was not found"
}

case "$kind $verb" in
  'tpu-vm create')
    [[ ! -f $FAKE_CLOUD/tpu ]] || fail 1 'ERROR: ALREADY_EXISTS'
    vanish # new machines: nothing is left of those that went away by themselves
    echo "READY ${flags[--accelerator-type]}" >"$FAKE_CLOUD/tpu"
    ;;
  'tpu-vm describe')
    missing tpu
    [[ ${flags[--format]} == 'value(state,acceleratorType)' ]] || fail 1 'ERROR: unexpected format'
    tr ' ' '\t' <"$FAKE_CLOUD/tpu"
    ;;
  'tpu-vm delete') vanish ;;
  'tpu-vm ssh')
    to_worker
    cd "$home"
    for name in ${!TPU_*}; do unset "$name"; done
    HOME=$home PATH=$FAKE_CLOUD/bin:$PATH exec bash -c "${flags[--command]}"
    ;;
  'tpu-vm scp')
    to_worker
    for i in 0 1; do
      if [[ ${names[i]} == *:* ]]; then names[i]=$home/${names[i]#*:}; fi
    done
    cp "${names[@]}"
    ;;
  'queued-resources create')
    echo "${FAKE_QUEUE_STATES:-WAITING_FOR_RESOURCES PROVISIONING ACTIVE}" >"$FAKE_CLOUD/queue"
    echo "${flags[--accelerator-type]}" >"$FAKE_CLOUD/queued-type"
    ;;
  'queued-resources describe')
    missing queue
    [[ ${flags[--format]} == 'value(state.state)' ]] || fail 1 'ERROR: unexpected format'
    read -r state later <"$FAKE_CLOUD/queue"
    if [[ -n $later ]]; then echo "$later" >"$FAKE_CLOUD/queue"; fi
    if [[ $state == ACTIVE && -f $FAKE_CLOUD/queued-type ]]; then
      echo "READY $(<"$FAKE_CLOUD/queued-type")" >"$FAKE_CLOUD/tpu"
      rm "$FAKE_CLOUD/queued-type"
    fi
    echo "$state"
    ;;
  'queued-resources delete')
    [[ ! -f $FAKE_CLOUD/tpu || -n ${flags[--force]-} ]] || fail 1 'ERROR: FAILED_PRECONDITION: it has nodes'
    vanish
    rm "$FAKE_CLOUD/queue"
    ;;
esac
