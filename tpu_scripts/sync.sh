#!/usr/bin/env bash
# shellcheck disable=SC2016  # what is in single quotes is for the workers
set -euo pipefail
# shellcheck source=tpu_scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
  cat <<'USAGE'
sync.sh [--archive FILE | --pack FILE]: copies the working tree to ~/jrlhf on every worker.

Copied are the files that git tracks and those that it does not ignore, as they are now. What was copied is in
~/jrlhf/.jrlhf-source/: commit, diff (against the commit), untracked (names), id (a hash of all files). Workers that
have this id are left alone; files that are gone here go there too. Refuses while a run is running.

Examples:
  tpu_scripts/sync.sh
  tpu_scripts/sync.sh --pack ../source.tgz && tpu_scripts/sync.sh --archive ../source.tgz

  --pack FILE     only write the archive, send nothing
  --archive FILE  send this archive, which --pack has written, in place of the working tree as it is now
USAGE
}

archive='' pack=''
while (($#)); do
  TAKEN=1
  case $1 in
    --archive)
      value_of "$@"
      archive=$2
      [[ -r $archive ]] || die 2 "--archive: no file $archive"
      ;;
    --pack)
      value_of "$@"
      pack=$2
      ;;
    *) common_option "$@" ;;
  esac
  shift "$TAKEN"
done
[[ -z $archive || -z $pack ]] || die 2 "--archive and --pack: choose one"
begin

# The working tree as a tar file, with .jrlhf-source/ in it.
pack_tree() { # FILE
  local root notes=$WORK/notes file
  root=$(git -C "$SCRIPTS" rev-parse --show-toplevel) || die 1 "$SCRIPTS is in no git repository: what to copy is read from git"
  mkdir -p "$notes/.jrlhf-source"
  cd "$root"
  while IFS= read -r -d '' file; do
    if [[ -e $file || -L $file ]]; then printf '%s\0' "$file"; fi # tracked files may be deleted
  done < <(git ls-files -z --cached --others --exclude-standard) | LC_ALL=C sort -zu >"$WORK/files"
  [[ -s $WORK/files ]] || die 1 "git lists no files in $root"
  if git rev-parse --verify --quiet HEAD >"$notes/.jrlhf-source/commit"; then
    git diff --binary HEAD >"$notes/.jrlhf-source/diff"
  else
    echo 'no commit yet' >"$notes/.jrlhf-source/commit"
    : >"$notes/.jrlhf-source/diff"
  fi
  git ls-files --others --exclude-standard >"$notes/.jrlhf-source/untracked"
  # Names, modes and contents; no times and no owners, so that equal trees have equal ids.
  tar --create --null --no-recursion --files-from="$WORK/files" --sort=name --mtime=@0 --owner=0 --group=0 \
    --numeric-owner | cat - "$notes/.jrlhf-source/commit" | sha256sum | cut -c1-16 >"$notes/.jrlhf-source/id"
  tar --create --gzip --file="$1" --null --no-recursion --files-from="$WORK/files" --no-null -C "$notes" \
    .jrlhf-source/commit .jrlhf-source/diff .jrlhf-source/untracked .jrlhf-source/id
  cd "$OLDPWD"
}

if [[ -z $archive ]]; then
  archive=${pack:-$WORK/source.tgz}
  [[ $archive == /* ]] || archive=$PWD/$archive
  pack_tree "$archive"
fi
id=$(tar --extract --gzip --to-stdout --file="$archive" .jrlhf-source/id) ||
  die 2 "$archive was not written by sync.sh --pack"
commit=$(tar --extract --gzip --to-stdout --file="$archive" .jrlhf-source/commit)
if [[ -n $pack ]]; then
  say "$archive: source $id (commit ${commit:0:12})"
  exit 0
fi

worker_list all
gather 'cat "$src/.jrlhf-source/id" 2>/dev/null || echo none
for job in "$jobs"/*/; do
  if [[ -d $job ]] && running "$job"; then echo "$(basename "$job")"; fi
done'
stale=()
if ((DRY_RUN)); then
  stale=("${WORKERS[@]}")
else
  report_failed 'looking at the source'
  for worker in "${WORKERS[@]}"; do
    mapfile -t said <"$WORK/$worker.out" # its id, then the runs that are running
    if [[ ${said[0]} == "$id" ]]; then continue; fi
    ((${#said[@]} == 1)) ||
      die 1 "run ${said[1]} is running on worker $worker, with other source than this: stop.sh --id ${said[1]} first"
    stale+=("$worker")
  done
fi
if ((${#stale[@]} == 0)); then
  say "source $id (commit ${commit:0:12}) is on all $ACC_HOSTS workers"
  exit 0
fi
WORKERS=("${stale[@]}")
say "source $id (commit ${commit:0:12}, $(du -h "$archive" | cut -f1)) goes to ${#WORKERS[@]} workers"
send_file "$archive" jrlhf-source.tgz
# Unpacked beside, then exchanged: a worker has the old tree or the new one. The environment is not within it.
on_workers 'unpacking the source' 'rm -rf "$src.new" "$src.old"
mkdir "$src.new"
tar -xzf "$HOME/jrlhf-source.tgz" -C "$src.new"
if [[ -e $src ]]; then mv "$src" "$src.old"; fi
mv "$src.new" "$src"
rm -rf "$src.old" "$HOME/jrlhf-source.tgz"'
if ((!DRY_RUN)); then say "source $id is on all $ACC_HOSTS workers"; fi
