#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: submit.sh --name NAME --runs-dir DIR [option ...] EXPERIMENT ... [-- JRLHF OPTION ...]

Submits a SLURM job that runs an experiment on several GPU nodes, or an array: each experiment x each seed is one task.
A job that stops at its time limit saves and goes on by itself (jrlhf.sbatch --help). A name that is queued or running
already is not submitted again.

  --name NAME          the job's name
  --runs-dir DIR       folder of runs, on a file system that all nodes share (default: $JRLHF_RUNS)
  --seeds A,B,...      an array task for each of these seeds (default: the seeds of the experiment)
  --parallel N         at most N tasks of an array at a time (default: as many as there is room for)
  --nodes N            nodes of a job or task (default: 1)
  --gpus N             GPUs of a node (default: 8)
  --cpus N             CPUs of a node (default: 8 for each GPU)
  --time LIMIT         time limit of one attempt (default: 24:00:00)
  --grace SECONDS      save so long before it (default: 180)
  --partition NAME, --account NAME
  --max-restarts N     requeue at most N times (default: 20)
  --jrlhf COMMAND      the program (default: .venv/bin/jrlhf of this checkout if there is one, or jrlhf)
  --dry-run            print what would be submitted, and ask SLURM nothing
  --help

Anything else that sbatch knows is set by its own variables: SBATCH_QOS, SBATCH_CONSTRAINT, SBATCH_EXCLUSIVE ...
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

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
jrlhf=$here/../../.venv/bin/jrlhf
if [[ -x $jrlhf ]]; then jrlhf=$(cd "$(dirname "$jrlhf")" && pwd)/jrlhf; else jrlhf=jrlhf; fi
name="" runs_dir=${JRLHF_RUNS:-} nodes=1 gpus=8 cpus="" limit=24:00:00 grace=180 parallel="" dry_run=no
sbatch=() batch=() experiments=() options=()
while (($#)); do
    case $1 in
        --help | -h) usage; exit 0 ;;
        --dry-run) dry_run=yes; shift ;;
        --name) name=$(value "$@"); shift 2 ;;
        --runs-dir) runs_dir=$(value "$@"); shift 2 ;;
        --parallel) parallel=$(value "$@"); shift 2 ;;
        --nodes) nodes=$(value "$@"); shift 2 ;;
        --gpus) gpus=$(value "$@"); shift 2 ;;
        --cpus) cpus=$(value "$@"); shift 2 ;;
        --time) limit=$(value "$@"); shift 2 ;;
        --grace) grace=$(value "$@"); shift 2 ;;
        --jrlhf) jrlhf=$(value "$@"); shift 2 ;;
        --partition | --account) given=$(value "$@"); sbatch+=("$1=$given"); shift 2 ;;
        --seeds | --max-restarts) given=$(value "$@"); batch+=("$1" "$given"); shift 2 ;;
        --) options=("$@"); break ;;
        -*) die "$1: no such option (see --help). Options of jrlhf come after --" ;;
        *) experiments+=("$1"); shift ;;
    esac
done

[[ $name =~ ^[A-Za-z0-9._-]+$ ]] || die "--name: expected letters, digits, '.', '_' and '-', got '$name'"
number --nodes "$nodes"
number --gpus "$gpus"
number --grace "$grace"
cpus=${cpus:-$((8 * gpus))}
number --cpus "$cpus"
[[ -z $parallel ]] || number --parallel "$parallel"
[[ -z $runs_dir || ! -d $runs_dir ]] || runs_dir=$(cd "$runs_dir" && pwd)

# The batch script checks its own arguments, and its dry run tells what each task will do.
batch=(--jrlhf "$jrlhf" --runs-dir "$runs_dir" "${batch[@]}" "${experiments[@]}" "${options[@]}")
listed=$(bash "$here/jrlhf.sbatch" --dry-run "${batch[@]}")
mapfile -t tasks <<<"$listed"

output=$name-%j.out
if ((${#tasks[@]} > 1)); then
    sbatch+=("--array=0-$((${#tasks[@]} - 1))${parallel:+%$parallel}")
    output=$name-%A_%a.out
fi
command=(sbatch --parsable "--job-name=$name" "--nodes=$nodes" --ntasks-per-node=1 "--gpus-per-node=$gpus"
    "--cpus-per-task=$cpus" "--time=$limit" "--signal=B:TERM@$grace" "--output=$runs_dir/slurm/$output"
    "${sbatch[@]}" "$here/jrlhf.sbatch" "${batch[@]}")

if [[ $dry_run == yes ]]; then
    echo "${command[*]@Q}"
    printf 'task %s\n' "${tasks[@]}"
    exit 0
fi

found=$(squeue --noheader --user="$(id -un)" --name="$name" --format='%i %T') ||
    die "squeue failed, so it is not known whether $name is queued already; nothing is submitted"
if [[ -n $found ]]; then
    echo "$name is queued or running already, and is not submitted again:"
    echo "$found"
    exit 0
fi
mkdir -p "$runs_dir/slurm" # SLURM does not make it, and a job without it fails without a word
id=$("${command[@]}") || die "sbatch failed; nothing is submitted"
echo "submitted $name as job ${id%%;*}: ${#tasks[@]} task(s), logs in $runs_dir/slurm"
