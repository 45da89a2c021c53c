#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: apply.sh [--dry-run] [--context NAME] tpu|gpu|queue RENDER OPTION ...

Fills a manifest (render.py --help lists the options) and gives it to the cluster. A JobSet that is there already is not
submitted again.

  --context NAME   kubectl's context (default: the current one)
  --dry-run        print the manifest, and ask the cluster nothing
  --help

  apply.sh tpu --name ppo --image IMAGE --claim runs --accelerator tpu-v5-lite-podslice --topology 4x4 EXPERIMENT
TEXT
}

die() {
    echo "error: $*" >&2
    exit 2
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
kubectl=(kubectl) dry_run=no
while (($#)); do
    case $1 in
        --help | -h) usage; exit 0 ;;
        --dry-run) dry_run=yes; shift ;;
        --context)
            (($# >= 2)) || die "--context: expected a name after it"
            kubectl+=("--context=$2"); shift 2 ;;
        tpu | gpu | queue) break ;;
        *) die "$1: expected tpu, gpu or queue (see --help)" ;;
    esac
done
(($#)) || die "expected tpu, gpu or queue (see --help)"

manifest=$(python3 "$here/render.py" "$@")
for argument; do
    [[ $argument != --help && $argument != -h ]] || { echo "$manifest"; exit 0; } # render.py's help
    [[ $argument != -- ]] || break
done
if [[ $dry_run == yes ]]; then
    echo "$manifest"
    exit 0
fi
command -v kubectl >/dev/null || die "there is no kubectl here: install it, and get the cluster's credentials"

if [[ $1 == queue ]]; then
    "${kubectl[@]}" apply --filename=- <<<"$manifest"
    exit 0
fi
found=$("${kubectl[@]}" get --ignore-not-found --filename=- \
    --output='jsonpath={.metadata.namespace} {.metadata.name} {.status.terminalState}' <<<"$manifest")
read -r namespace name state <<<"$found"
case $name,$state in
    ,) "${kubectl[@]}" create --filename=- <<<"$manifest" ;;
    *,) echo "$name is there already, and is not submitted again: kubectl --namespace=$namespace describe jobset $name" ;;
    *,Completed) echo "$name has finished. To run it again: kubectl --namespace=$namespace delete jobset $name" ;;
    *)
        echo "error: $name is there already: ${state,,}. Look at its pods' logs; to run it again:" \
            "kubectl --namespace=$namespace delete jobset $name" >&2
        exit 1
        ;;
esac
