#!/usr/bin/env bash
set -euo pipefail
# shellcheck source=tpu_scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

tries=5
pause=5
usage() {
  cat <<'USAGE'
setup.sh [--archive FILE]: makes every worker ready: source (sync.sh), storage, Python environment with jax[tpu].

The environment is ~/jrlhf-venv, with the versions of constraints.txt, made by uv (which brings Python TPU_PYTHON where
the image has none). It is not made again while pyproject.toml, constraints.txt and TPU_PYTHON are the same. TPU_STORAGE
is mounted at TPU_RUNS_DIR whenever it is not. TPU_SETUP_HOOK runs each time, and should bear that. What fails on the way to a server is tried again, with longer pauses.

Examples:
  tpu_scripts/setup.sh
  TPU_SETUP_HOOK=my_hook.sh tpu_scripts/setup.sh      # my_hook.sh: sudo apt-get install ... on every worker

  --archive FILE  source from `sync.sh --pack FILE`, in place of the working tree
  --tries N       tries of each step (default: 5)
  --pause S       pause before the second try; doubles, to at most 60 s (default: 5)
USAGE
}

sync_options=()
while (($#)); do
  TAKEN=1
  case $1 in
    --archive)
      value_of "$@"
      sync_options=(--archive "$2")
      ;;
    --tries)
      value_of "$@"
      whole_number "$1" "$2"
      tries=$2
      ;;
    --pause)
      value_of "$@"
      whole_number "$1" "$2"
      pause=$2
      ;;
    *) common_option "$@" ;;
  esac
  shift "$TAKEN"
done
begin

if ((DRY_RUN)); then sync_options+=(--dry-run); fi
"$SCRIPTS/sync.sh" "${sync_options[@]}"

script=$(
  printf 'tries=%q pause=%q python=%q storage=%q\n' "$tries" "$pause" "$TPU_PYTHON" "$TPU_STORAGE"
  cat <<'REMOTE'
retry() {
  local n=1 wait=$pause
  until "$@"; do
    if ((n >= tries)); then echo "failed $n times: $*" >&2; return 1; fi
    echo "try $n failed, the next in $wait s: $*" >&2
    sleep "$wait"
    n=$((n + 1)) wait=$((wait * 2 > 60 ? 60 : wait * 2))
  done
}
export PIP_BREAK_SYSTEM_PACKAGES=1 PIP_DISABLE_PIP_VERSION_CHECK=1 DEBIAN_FRONTEND=noninteractive
REMOTE
  if [[ -n $TPU_SETUP_HOOK ]]; then
    printf 'hook=%q\n' "$(<"$TPU_SETUP_HOOK")"
    cat <<'REMOTE'
bash -euo pipefail -c "$hook" || { code=$?; echo "TPU_SETUP_HOOK failed" >&2; exit "$code"; }
REMOTE
  fi
  cat <<'REMOTE'
if [[ -n $storage ]] && ! mountpoint -q "$runs"; then
  sudo mkdir -p "$runs"
  if [[ $storage == gs://* ]]; then
    command -v gcsfuse >/dev/null || retry sudo apt-get install -y -q gcsfuse ||
      { echo "gcsfuse cannot be installed: let TPU_SETUP_HOOK add its package source (Cloud Storage FUSE, Install)" >&2; exit 1; }
    sudo chown "$(id -u):$(id -g)" "$runs"
    # A checkpoint is committed by renaming a folder, which gcsfuse refuses without a limit.
    retry gcsfuse --implicit-dirs --rename-dir-limit 1000000 "${storage#gs://}" "$runs"
  else
    command -v mount.nfs >/dev/null || retry sudo apt-get install -y -q nfs-common
    retry sudo mount -t nfs "$storage" "$runs"
    [[ -w $runs ]] || sudo chmod a+rwx "$runs"
  fi
  echo "mounted $storage at $runs"
fi
mkdir -p "$runs"
cd "$src"
stamp=$(cat pyproject.toml constraints.txt <(echo "$python") | sha256sum | cut -c1-16)
if [[ -f $venv/.jrlhf-stamp && $(cat "$venv/.jrlhf-stamp") == "$stamp" ]]; then
  echo "environment $stamp is there"
  exit 0
fi
rm -f "$venv/.jrlhf-stamp"
retry python3 -m pip install -q --user uv
rm -rf "$venv"
retry python3 -m uv venv -q --seed --python "$python" "$venv"
retry "$venv/bin/python" -m pip install -q -c constraints.txt -e '.[tpu]'
"$venv/bin/jrlhf" --version
echo "$stamp" >"$venv/.jrlhf-stamp"
echo "environment $stamp is made"
REMOTE
)
worker_list all
if ((!DRY_RUN)); then say "setting up $ACC_HOSTS workers: minutes the first time, and nothing is printed before all are done"; fi
on_workers 'setting up' "$script"
