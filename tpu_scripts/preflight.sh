#!/usr/bin/env bash
set -euo pipefail
# shellcheck source=tpu_scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

limit=300
usage() {
  cat <<'USAGE'
preflight.sh: two minutes that save a night. On all workers, and before anything long is started:

  devices    jax sees as many as the accelerator has chips
  psum       a sum over all devices is right, so that the workers reach one another
  storage    TPU_RUNS_DIR can be written, read and deleted; with several workers, all see the same folder

Example:
  tpu_scripts/preflight.sh

  --limit S       longest wait for the devices (default: 300)
USAGE
}

while (($#)); do
  TAKEN=1
  case $1 in
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
worker_list all
token=preflight-$$-$RANDOM

storage=$(
  printf 'token=%q\n' "$token"
  cat <<'REMOTE'
mkdir -p "$runs"
file=$runs/.$token-$(hostname)-$$
echo "$token" >"$file"
[[ $(cat "$file") == "$token" ]] || { echo "$file does not hold what was written to it" >&2; exit 1; }
rm "$file"
[[ ! -e $file ]] || { echo "$file is still there after rm" >&2; exit 1; }
echo "storage: $runs can be written, read and deleted ($(df -h --output=avail "$runs" | tail -n 1 | tr -d ' ') free)"
REMOTE
)
on_workers 'writing to TPU_RUNS_DIR' "$storage"

if ((ACC_HOSTS > 1)); then
  worker_list 0
  on_workers 'writing for the others to read' "echo $token >\"\$runs/.$token\""
  worker_list all
  gather "[[ -f \$runs/.$token ]] || { echo \"\$runs here is not worker 0's\" >&2; exit 1; }"
  alone=("${FAILED[@]-}")
  worker_list 0
  on_workers 'cleaning up' "rm -f \"\$runs/.$token\""
  [[ -z ${alone[*]} ]] || die 1 "workers ${alone[*]} do not see the runs folder of worker 0. jrlhf --distributed needs" \
    "one folder for all: set TPU_STORAGE and TPU_RUNS_DIR (env.sh --help), then setup.sh"
  ((DRY_RUN)) || echo 'storage: all workers see the same folder'
fi

devices=$(
  printf 'chips=%q hosts=%q limit=%q\n' "$ACC_CHIPS" "$ACC_HOSTS" "$limit"
  cat <<'REMOTE'
for job in "$jobs"/*/; do
  if [[ -d $job ]] && running "$job"; then
    echo "run $(basename "$job") is running and has the TPU: stop.sh --id $(basename "$job") first" >&2
    exit 1
  fi
done
code=0
timeout "$limit" "$venv/bin/python" - "$chips" "$hosts" <<'PYTHON' || code=$?
import sys

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

chips, hosts = int(sys.argv[1]), int(sys.argv[2])
if hosts > 1:
    jax.distributed.initialize()
if (jax.device_count(), jax.process_count()) != (chips, hosts):
    sys.exit(
        f"jax sees {jax.device_count()} devices of {jax.process_count()} workers ({jax.devices()[0].device_kind}); "
        f"there should be {chips} of {hosts}"
    )
mesh = Mesh(np.array(jax.devices()), ("all",))
numbers = np.arange(1, chips + 1, dtype=np.float32)
spread = jax.make_array_from_callback((chips,), NamedSharding(mesh, P("all")), lambda where: numbers[where])
add = jax.jit(jax.shard_map(lambda x: jax.lax.psum(x, "all"), mesh=mesh, in_specs=P("all"), out_specs=P()))
total, right = float(add(spread).addressable_data(0)[0]), float(numbers.sum())
if total != right:
    sys.exit(f"psum over {chips} devices gives {total}, not {right}")
print(f"devices: {chips} x {jax.devices()[0].device_kind}, psum is right (jax {jax.__version__})")
PYTHON
if ((code == 124)); then
  echo "no answer within $limit s: a worker that does not take part keeps all waiting" >&2
fi
exit "$code"
REMOTE
)
worker_list all
on_workers 'the check of devices' "$devices"
if ((!DRY_RUN)); then say "$TPU_NAME is fit: $ACC_CHIPS chips on $ACC_HOSTS workers"; fi
