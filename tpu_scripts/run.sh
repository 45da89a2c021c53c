#!/usr/bin/env bash
# shellcheck disable=SC2016  # what is in single quotes is for the workers
set -euo pipefail
# shellcheck source=tpu_scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
  cat <<'USAGE'
run.sh [--id ID] -- COMMAND [ARGUMENT ...]: starts a command on all workers and leaves it running there.

It runs in ~/jrlhf, with the environment of setup.sh and JRLHF_RUNS set to TPU_RUNS_DIR. On several workers
`--distributed` is added to `jrlhf run`. ~/jrlhf-jobs/ID/ on each worker holds its pid, log, command, source, and exit
(the exit code, once it has ended). An id that is still running is refused; a finished one runs again and its log goes
on. A TPU serves one process at a time: a second run under another id ends with an error of libtpu's.

Exit code 75 of a run: it was asked to stop and has saved; the same command goes on. babysit.sh does that for you.

Examples:
  tpu_scripts/run.sh -- jrlhf run experiments/gsm8k/grpo.py --mesh.fsdp 16
  tpu_scripts/run.sh -- LIBTPU_INIT_ARGS=--xla_tpu_scoped_vmem_limit_kib=65536 jrlhf run experiments/gsm8k/grpo.py
  tpu_scripts/run.sh --id probe -- python -c 'import jax; print(jax.local_devices())'

  --id ID         name of the run (default: main)
USAGE
}

while (($#)); do
  TAKEN=1
  case $1 in
    --id) run_id "$@" ;;
    --)
      shift
      break
      ;;
    *) common_option "$@" ;;
  esac
  shift "$TAKEN"
done
(($#)) || die 2 "no command: run.sh [--id ID] -- COMMAND ... (run.sh --help)"
begin

command=("$@")
first=0 # NAME=VALUE may come before the command, as in a shell
while [[ ${command[first]-} =~ ^[A-Za-z_][A-Za-z0-9_]*= ]]; do first=$((first + 1)); done
((first < ${#command[@]})) || die 2 "no command after ${command[*]} (run.sh --help)"
if ((ACC_HOSTS > 1)) && [[ ${command[first]##*/} == jrlhf && ${command[first + 1]-} == run ]]; then
  [[ " $* " == *' --distributed '* ]] || command+=(--distributed)
fi
printf -v line '%q ' "${command[@]}"

# The process that is started, which outlives the connection: it starts the command, writes down its number, and waits
# for it. The number is the command's own, so that signals reach it and not a shell around it.
launcher=$(
  remote_prelude
  printf 'job=$jobs/%q\n' "$RUN_ID"
  cat <<'REMOTE'
cd "$src"
export PATH=$venv/bin:$PATH JRLHF_RUNS=$runs PYTHONUNBUFFERED=1
REMOTE
  printf '%s&\n' "$line"
  cat <<'REMOTE'
pid=$!
echo "$pid $(started "$pid" || echo ended) $$" >"$job/pid.new"
mv "$job/pid.new" "$job/pid"
code=0
wait "$pid" || code=$?
echo "$code" >"$job/exit.new"
mv "$job/exit.new" "$job/exit"
REMOTE
)
script=$(
  printf 'id=%q\nline=%q\n' "$RUN_ID" "${line% }"
  cat <<'REMOTE'
job=$jobs/$id
[[ -d $src ]] || { echo "there is no ~/jrlhf: setup.sh first" >&2; exit 1; }
if running "$job"; then echo "run $id is running already (PID $pid)" >&2; exit 1; fi
mkdir -p "$job" "$runs"
rm -rf "$job/exit" "$job/pid" "$job/source"
if [[ -d $src/.jrlhf-source ]]; then cp -r "$src/.jrlhf-source" "$job/source"; fi
printf '%s\n' "$line" >"$job/command"
REMOTE
  # %q leaves no line end in the command, so that no line of it can end this.
  printf "cat >\"\$job/launch.sh\" <<'LAUNCHER'\n%s\nLAUNCHER\n" "$launcher"
  cat <<'REMOTE'
printf -- '--- %s: %s\n' "$(date -u +%FT%TZ)" "$line" >>"$job/log"
setsid nohup bash "$job/launch.sh" </dev/null >>"$job/log" 2>&1 &
for ((i = 0; i < 100; i++)); do
  if [[ -f $job/pid ]]; then read -r pid _ <"$job/pid"; echo "started, PID $pid"; exit 0; fi
  sleep 0.1
done
echo "did not start: the end of $job/log is" >&2
tail -n 20 "$job/log" >&2
exit 1
REMOTE
)

# Nowhere before everywhere: half a pod would wait for the other half.
run_states
for worker in "${!STATES[@]}"; do
  [[ ${STATES[worker]} != running* ]] ||
    die 1 "run $RUN_ID is still ${STATES[worker]/running/running, PID} on worker $worker: stop.sh --id $RUN_ID first," \
      "or take another --id"
done
if ! on_workers 'starting the run' "$script"; then
  die 1 "run $RUN_ID did not start on all workers: stop.sh --id $RUN_ID, then run.sh again"
fi
if ((!DRY_RUN)); then say "run $RUN_ID: ${line% }. Next: logs.sh --id $RUN_ID, status.sh, stop.sh --id $RUN_ID"; fi
