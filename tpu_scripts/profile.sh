#!/usr/bin/env bash
set -euo pipefail
# shellcheck source=tpu_scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
  cat <<'USAGE'
profile.sh [--id ID] [--worker N|all]: asks a running run for a profile, and fetches it.

Sends SIGUSR1 to the recorded process, on which jrlhf traces some steps into a folder profile/ of its run, waits until
the trace is written and its size rests, and copies it. A process that does not handle SIGUSR1 would die of it, and
gets none. View it with TensorBoard or Perfetto.

Examples:
  tpu_scripts/profile.sh
  tpu_scripts/profile.sh --worker all --to profiles/slow-steps

  --id ID         name of the run (default: main)
  --worker N      a worker's number, several with commas, or all (default: 0)
  --limit S       longest wait for the trace (default: 300)
  --to FOLDER     (default: profiles); each worker's in worker-N/
USAGE
}

which=0 limit=300 to=profiles
while (($#)); do
  TAKEN=1
  case $1 in
    --id) run_id "$@" ;;
    --worker)
      value_of "$@"
      which=$2
      ;;
    --limit)
      value_of "$@"
      whole_number "$1" "$2"
      limit=$2
      ;;
    --to)
      value_of "$@"
      to=$2
      ;;
    *) common_option "$@" ;;
  esac
  shift "$TAKEN"
done
begin

script=$(
  printf 'id=%q limit=%q\n' "$RUN_ID" "$limit"
  cat <<'REMOTE'
job=$jobs/$id
if ! running "$job"; then echo "run $id is not running: $(state_of "$job")" >&2; exit 1; fi
caught=$(sed -n 's/^SigCgt:[[:space:]]*//p' "/proc/$pid/status") # a mask in hexadecimal; SIGUSR1 is its tenth bit
if (((16#${caught: -4} >> 9 & 1) == 0)); then
  echo "PID $pid does not handle SIGUSR1 (not jrlhf, or it has only just begun): nothing was sent" >&2
  exit 1
fi
mark=$runs/.profile-asked-$(hostname)-$$ # among the runs, so that one clock dates it and the trace
touch "$mark"
trap 'rm -f "$mark"' EXIT
kill -USR1 "$pid"
traces() { find "$runs" -path '*/profile/*' -type f -newer "$mark" -printf '%P\0'; }
sizes() { find "$runs" -path '*/profile/*' -type f -newer "$mark" -printf '%P %s\n' | sort; }
before=
end=$((SECONDS + limit))
while ((SECONDS < end)); do
  sleep 1
  now=$(sizes)
  if [[ -n $now && $now == "$before" ]]; then
    traces | tar -czf "$HOME/jrlhf-profile.tgz" -C "$runs" --null --files-from=-
    echo "$now"
    exit 0
  fi
  before=$now
done
echo "no trace within $limit s of SIGUSR1: is the run in a step? (logs.sh)" >&2
exit 1
REMOTE
)
worker_list "$which"
chosen=("${WORKERS[@]}")
on_workers 'asking for a profile' "$script"
for worker in "${chosen[@]}"; do fetch_tar "$worker" jrlhf-profile.tgz "$to/worker-$worker"; done
if ((!DRY_RUN)); then say "profiles are in $to: tensorboard --logdir $to"; fi
