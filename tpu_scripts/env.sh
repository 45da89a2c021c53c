#!/usr/bin/env bash
# Configuration and the table of accelerators. Sourced by lib.sh; run it to see both.
# shellcheck disable=SC2034  # what is set here is read by the scripts
set -euo pipefail

DEFAULT_CONFIG=$HOME/.config/jrlhf/tpu.env
CONFIG_KEYS=(
  TPU_PROJECT TPU_ZONE TPU_NAME TPU_ACCELERATOR TPU_RUNTIME TPU_NETWORK TPU_SUBNETWORK TPU_SERVICE_ACCOUNT
  TPU_INTERNAL_IP TPU_STORAGE TPU_RUNS_DIR TPU_PYTHON TPU_SETUP_HOOK TPU_PARALLEL
)

# Exit codes of all scripts: 0 done, 1 something failed, 2 a mistake in options or configuration, 124 a time limit.
die() {
  local code=$1
  shift
  printf 'error: %s\n' "$*" >&2
  exit "$code"
}

# name, gcloud's name, topology, chips, chips per host, hosts (= VMs = workers), GiB of HBM per chip, runtime version.
# v4 and v5p count TensorCores, of which a chip has two; v5e and v6e count chips. A VM of a slice of several hosts has
# four chips in every generation.
accelerator_table() {
  cat <<'TABLE'
v4-8 v4-8 2x2x1 4 4 1 32 tpu-ubuntu2204-base
v4-16 v4-16 2x2x2 8 4 2 32 tpu-ubuntu2204-base
v4-32 v4-32 2x2x4 16 4 4 32 tpu-ubuntu2204-base
v4-64 v4-64 2x4x4 32 4 8 32 tpu-ubuntu2204-base
v4-128 v4-128 4x4x4 64 4 16 32 tpu-ubuntu2204-base
v4-256 v4-256 4x4x8 128 4 32 32 tpu-ubuntu2204-base
v5e-1 v5litepod-1 1x1 1 1 1 16 v2-alpha-tpuv5-lite
v5e-4 v5litepod-4 2x2 4 4 1 16 v2-alpha-tpuv5-lite
v5e-8 v5litepod-8 2x4 8 8 1 16 v2-alpha-tpuv5-lite
v5e-16 v5litepod-16 4x4 16 4 4 16 v2-alpha-tpuv5-lite
v5e-32 v5litepod-32 4x8 32 4 8 16 v2-alpha-tpuv5-lite
v5e-64 v5litepod-64 8x8 64 4 16 16 v2-alpha-tpuv5-lite
v5e-128 v5litepod-128 8x16 128 4 32 16 v2-alpha-tpuv5-lite
v5e-256 v5litepod-256 16x16 256 4 64 16 v2-alpha-tpuv5-lite
v5p-8 v5p-8 2x2x1 4 4 1 95 v2-alpha-tpuv5
v5p-16 v5p-16 2x2x2 8 4 2 95 v2-alpha-tpuv5
v5p-32 v5p-32 2x2x4 16 4 4 95 v2-alpha-tpuv5
v5p-64 v5p-64 2x4x4 32 4 8 95 v2-alpha-tpuv5
v5p-128 v5p-128 4x4x4 64 4 16 95 v2-alpha-tpuv5
v5p-256 v5p-256 4x4x8 128 4 32 95 v2-alpha-tpuv5
v6e-1 v6e-1 1x1 1 1 1 32 v2-alpha-tpuv6e
v6e-4 v6e-4 2x2 4 4 1 32 v2-alpha-tpuv6e
v6e-8 v6e-8 2x4 8 8 1 32 v2-alpha-tpuv6e
v6e-16 v6e-16 4x4 16 4 4 32 v2-alpha-tpuv6e
v6e-32 v6e-32 4x8 32 4 8 32 v2-alpha-tpuv6e
v6e-64 v6e-64 8x8 64 4 16 32 v2-alpha-tpuv6e
v6e-128 v6e-128 8x16 128 4 32 32 v2-alpha-tpuv6e
v6e-256 v6e-256 16x16 256 4 64 32 v2-alpha-tpuv6e
TABLE
}

# Reads KEY=VALUE lines. They are not executed, and what the environment says goes before them.
read_config() {
  local file=$1 line key value number=0
  local -A seen=()
  [[ -r $file ]] || die 2 "--config: no file $file that can be read"
  while IFS= read -r line || [[ -n $line ]]; do
    number=$((number + 1))
    line=${line%$'\r'}
    [[ $line =~ ^[[:space:]]*(#.*)?$ ]] && continue
    [[ $line =~ ^[[:space:]]*([A-Za-z_][A-Za-z0-9_]*)[[:space:]]*=[[:space:]]*(.*)$ ]] ||
      die 2 "$file:$number: expected KEY=VALUE, got: $line"
    key=${BASH_REMATCH[1]} value=${BASH_REMATCH[2]}
    value=${value%"${value##*[![:space:]]}"}
    if [[ $value =~ ^\"(.*)\"$ || $value =~ ^\'(.*)\'$ ]]; then value=${BASH_REMATCH[1]}; fi
    [[ " ${CONFIG_KEYS[*]} " == *" $key "* ]] || die 2 "$file:$number: unknown key $key. Known: ${CONFIG_KEYS[*]}"
    [[ -z ${seen[$key]-} ]] || die 2 "$file:$number: $key is set again (first in line ${seen[$key]})"
    seen[$key]=$number
    [[ -n ${!key-} ]] || printf -v "$key" '%s' "$value"
  done <"$file"
}

# Sets and exports all of CONFIG_KEYS, and ACC_{NAME,GCLOUD,TOPOLOGY,CHIPS,CHIPS_PER_HOST,HOSTS,HBM}.
# $1: a configuration file; empty: the default one, if it exists.
load_config() {
  local key missing=() known name gcloud_name runtime
  if [[ -n $1 ]]; then
    read_config "$1"
  elif [[ -e $DEFAULT_CONFIG ]]; then
    read_config "$DEFAULT_CONFIG"
  fi
  for key in TPU_PROJECT TPU_ZONE TPU_NAME TPU_ACCELERATOR; do
    [[ -n ${!key-} ]] || missing+=("$key")
  done
  ((${#missing[@]} == 0)) ||
    die 2 "not set: ${missing[*]}. Write lines such as ${missing[0]}=VALUE into ${1:-$DEFAULT_CONFIG}, or set it in" \
      "the environment (env.sh --help)"
  : "${TPU_NETWORK:=}" "${TPU_SUBNETWORK:=}" "${TPU_SERVICE_ACCOUNT:=}" "${TPU_INTERNAL_IP:=0}" "${TPU_STORAGE:=}"
  : "${TPU_RUNS_DIR:=jrlhf-runs}" "${TPU_PYTHON:=3.12}" "${TPU_SETUP_HOOK:=}" "${TPU_PARALLEL:=16}"

  known=$(accelerator_table | cut -d' ' -f1 | paste -sd' ')
  ACC_NAME=
  while read -r name gcloud_name ACC_TOPOLOGY ACC_CHIPS ACC_CHIPS_PER_HOST ACC_HOSTS ACC_HBM runtime; do
    if [[ $TPU_ACCELERATOR == "$name" || $TPU_ACCELERATOR == "$gcloud_name" ]]; then
      ACC_NAME=$name ACC_GCLOUD=$gcloud_name
      : "${TPU_RUNTIME:=$runtime}"
      break
    fi
  done < <(accelerator_table)
  [[ -n $ACC_NAME ]] || die 2 "TPU_ACCELERATOR=$TPU_ACCELERATOR: unknown accelerator. Known: $known"

  [[ $TPU_NAME =~ ^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$ ]] ||
    die 2 "TPU_NAME=$TPU_NAME: must be lower-case letters, digits and hyphens, and begin with a letter"
  [[ $TPU_INTERNAL_IP == [01] ]] || die 2 "TPU_INTERNAL_IP=$TPU_INTERNAL_IP: must be 0 or 1"
  [[ $TPU_PARALLEL =~ ^[1-9][0-9]*$ ]] || die 2 "TPU_PARALLEL=$TPU_PARALLEL: must be a positive number"
  [[ -z $TPU_STORAGE || $TPU_STORAGE =~ ^gs://[^/]+$ || $TPU_STORAGE =~ ^[^/:]+:/ ]] ||
    die 2 "TPU_STORAGE=$TPU_STORAGE: must be gs://BUCKET or HOST:/SHARE (NFS), or empty"
  [[ -z $TPU_STORAGE || $TPU_RUNS_DIR == /* ]] ||
    die 2 "TPU_RUNS_DIR=$TPU_RUNS_DIR: with TPU_STORAGE it is where that is mounted, and must begin with /"
  [[ -z $TPU_SETUP_HOOK || -r $TPU_SETUP_HOOK ]] || die 2 "TPU_SETUP_HOOK=$TPU_SETUP_HOOK: no such file"
  export "${CONFIG_KEYS[@]}"
}

env_usage() {
  cat <<'USAGE'
env.sh [--config FILE]: prints the configuration that the other scripts will use, and the accelerators they know.

A setting is an environment variable, or a line KEY=VALUE of ~/.config/jrlhf/tpu.env (or of --config FILE).
The environment goes before the file. The file is read, not executed; a comment is a line that begins with #.

  TPU_PROJECT          Google Cloud project
  TPU_ZONE             zone, such as us-east5-a
  TPU_NAME             the TPU's name; its queued resource is called NAME-queue
  TPU_ACCELERATOR      such as v5e-16 (v5litepod-16 is the same) or v5p-128, from the table
  TPU_RUNTIME          runtime version (default: the table's)
  TPU_NETWORK, TPU_SUBNETWORK, TPU_SERVICE_ACCOUNT     passed on when a TPU is created (default: the project's)
  TPU_INTERNAL_IP      1: no external addresses; ssh goes to the internal ones (default: 0)
  TPU_STORAGE          gs://BUCKET or HOST:/SHARE, mounted by setup.sh at TPU_RUNS_DIR on every worker. Several hosts
                       need storage that all of them see, and only storage outlives a preemption. (default: none)
  TPU_RUNS_DIR         folder of runs on the workers (default: jrlhf-runs in the home folder)
  TPU_PYTHON           Python version of the workers' environment (default: 3.12)
  TPU_SETUP_HOOK       local bash file that setup.sh runs on every worker before it mounts and installs
  TPU_PARALLEL         ssh connections at a time (default: 16)

  --config FILE        read FILE instead of ~/.config/jrlhf/tpu.env
  --dry-run            the same: this script changes nothing

Example:
  TPU_NAME=rlhf TPU_ACCELERATOR=v5e-16 TPU_PROJECT=my-project TPU_ZONE=us-west4-a tpu_scripts/env.sh
USAGE
}

env_main() {
  local config='' key
  while (($#)); do
    case $1 in
      -h | --help) env_usage && return ;;
      --dry-run) ;;
      --config)
        (($# > 1)) || die 2 "--config: a file is missing"
        config=$2
        shift
        ;;
      *) die 2 "unknown option $1 (env.sh --help)" ;;
    esac
    shift
  done
  (printf 'name gcloud topology chips chips/host hosts HBM-GiB/chip runtime\n' && accelerator_table) |
    awk '{printf "%-8s %-14s %-9s %5s %10s %5s %12s  %s\n", $1, $2, $3, $4, $5, $6, $7, $8}'
  printf '\n'
  load_config "$config"
  for key in "${CONFIG_KEYS[@]}"; do printf '%s=%s\n' "$key" "${!key}"; done
  printf '\n%s: %s chips (%s), %s workers of %s, %s GiB of HBM in all\n' "$ACC_NAME" "$ACC_CHIPS" "$ACC_TOPOLOGY" \
    "$ACC_HOSTS" "$ACC_CHIPS_PER_HOST" "$((ACC_CHIPS * ACC_HBM))"
}

(return 0 2>/dev/null) || env_main "$@"
