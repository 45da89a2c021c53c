#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: xpk.sh --name NAME --cluster CLUSTER --tpu-type TYPE --image IMAGE --runs-dir DIR [option ...] EXPERIMENT
              [-- JRLHF OPTION ...]

Runs an experiment on TPU slices of a cluster that XPK made, by `xpk workload create`. A workload of that name that is
there already is not submitted again.

  --name NAME          the workload's name
  --cluster CLUSTER    the cluster's name
  --tpu-type TYPE      of a slice, for example v5litepod-16
  --slices N           slices (default: 1)
  --image IMAGE        container image (tpu_scripts/docker)
  --runs-dir DIR       folder of runs, where `xpk storage attach --auto-mount=true` mounts what all hosts share
  --max-restarts N     restarts of all hosts together (default: 20)
  --grace SECONDS      time to save in when told to stop (default: 300)
  --project P, --zone Z  default: those of gcloud
  --dry-run            print the command, and run nothing
  --help
TEXT
}

die() {
    echo "error: $*" >&2
    exit 2
}

value() { # OPTION [VALUE ...]
    (($# >= 2)) || die "$1: expected a value after it (see --help)"
    printf '%s' "$2"
}

number() { # OPTION VALUE
    [[ $2 =~ ^[1-9][0-9]*$ ]] || die "$1: expected a number of at least 1, got '$2'"
}

name="" cluster="" tpu_type="" slices=1 image="" runs_dir="" max_restarts=20 grace=300 dry_run=no experiment=""
place=() options=()
while (($#)); do
    case $1 in
        --help | -h) usage; exit 0 ;;
        --dry-run) dry_run=yes; shift ;;
        --name) name=$(value "$@"); shift 2 ;;
        --cluster) cluster=$(value "$@"); shift 2 ;;
        --tpu-type) tpu_type=$(value "$@"); shift 2 ;;
        --slices) slices=$(value "$@"); shift 2 ;;
        --image) image=$(value "$@"); shift 2 ;;
        --runs-dir) runs_dir=$(value "$@"); shift 2 ;;
        --max-restarts) max_restarts=$(value "$@"); shift 2 ;;
        --grace) grace=$(value "$@"); shift 2 ;;
        --project | --zone) given=$(value "$@"); place+=("$1=$given"); shift 2 ;;
        --) shift; options=("$@"); break ;;
        -*) die "$1: no such option (see --help). Options of jrlhf come after --" ;;
        *)
            [[ -z $experiment ]] || die "$1: expected one experiment, and $experiment is given already"
            experiment=$1; shift ;;
    esac
done
[[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] ||
    die "--name: use small letters, digits and '-', beginning with a letter; got '$name'"
[[ -n $cluster ]] || die "--cluster: expected the cluster's name"
[[ -n $tpu_type ]] || die "--tpu-type: expected the type of a slice, for example v5litepod-16"
[[ -n $image ]] || die "--image: expected a container image"
[[ $runs_dir == /* ]] || die "--runs-dir: expected a path in the container, from /, got '$runs_dir'"
[[ -n $experiment ]] || die "expected an experiment, as the container finds it"
number --slices "$slices"
number --grace "$grace"
[[ $max_restarts =~ ^[0-9]+$ ]] || die "--max-restarts: expected a number, got '$max_restarts'"
for option in "${options[@]}"; do
    case ${option%%=*} in
        --force) die "--force: every restart would throw away what the one before saved" ;;
        --runs-dir | --distributed) die "$option: this script sets it; give it before --" ;;
    esac
done

jrlhf=(jrlhf run "$experiment" --distributed --runs-dir "$runs_dir" "${options[@]}")
# `exec`: XPK sends SIGTERM to the shell that it runs the command in, which would not pass it on.
# 75: asked to stop, and saved. XPK restarts after it only if told so.
command=(xpk workload create "--workload=$name" "--cluster=$cluster" "--tpu-type=$tpu_type" "--num-slices=$slices"
    "--docker-image=$image" "--max-restarts=$max_restarts" --restart-on-exit-codes=75
    "--termination-grace-period-seconds=$grace" "${place[@]}" "--command=exec ${jrlhf[*]@Q}")
if [[ $dry_run == yes ]]; then
    echo "${command[*]@Q}"
    exit 0
fi
command -v xpk >/dev/null || die "there is no xpk here: pip install xpk"
listed=$(xpk workload list "--cluster=$cluster" "${place[@]}" "--filter-by-job=^$name\$") ||
    die "xpk workload list failed, so it is not known whether $name is there already; nothing is submitted"
found=$(awk -v name="$name" '$1 == name' <<<"$listed") # a table whose first column is the name, and other lines
if [[ -n $found ]]; then
    echo "$name is there already, and is not submitted again:"
    echo "$found"
    exit 0
fi
"${command[@]}"
