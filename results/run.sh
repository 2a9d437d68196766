#!/usr/bin/env bash
# Everything that README.md and details.md beside this file show: data, runs, measurements, tables. The same
# command again goes on where it was stopped; what is finished is not run again. Needs requirements-dev.txt (scipy).
#
#   bash results/run.sh              # about thirty hours on two cores of a server
#   bash results/run.sh --quick      # a tenth as long, one seed, no search: half an hour; in out/quick/
#
# CORPUS     a folder of the six texts; results/texts.py makes it where it is missing             data/corpus
# TREEBANKS  a folder for Universal NER's .iob2 files, downloaded where missing                         data/uner
# JOBS       runs at once, of one thread each                                                           2
set -euo pipefail
cd "$(dirname "$0")/.."
corpus=${CORPUS:-data/corpus} treebanks=${TREEBANKS:-data/uner} jobs=${JOBS:-2} failed=
export OMP_NUM_THREADS=1
python -c "import scipy" 2> /dev/null || { echo "first: pip install -r requirements-dev.txt" >&2; exit 1; }

texts() { printf '%s\n' "$corpus"/*."$1".txt | paste -sd, -; }
prepare() { [ -e "data/$1" ] || python prepare.py --out="data/$1" "${@:2}"; }
numbered() { mapfile -t all; local i=0; for one in "${all[@]}"; do echo "echo '$1 $((i += 1)) of ${#all[@]}' >&2; $one"; done; }
# A command that fails stops no other: its cells of the tables say "not measured".
work() { python results/plan.py "$@" | numbered "$1" | tr '\n' '\0' | xargs -0 -n 1 -P "$jobs" sh -c 'sh -c "$1" || exit 1' _ || failed+=" $1"; }
score() { python results/plan.py fetch "$treebanks" "$@" && work ner "$treebanks" "$@"; }

prepare pydocs
if [ -e "$corpus" ] || python results/texts.py "$corpus"; then
  prepare books --source="$(texts train)" --val="$(texts val)"
  prepare search --source="$(texts train)"
  prepare books-by-pydocs --tokenizer=data/pydocs --source="$(texts train)" --max_tokens=10000 --val="$(texts val)"
  prepare scarce --source="$corpus/brown.train.txt" --max_tokens=1000000 --val="$corpus/brown.val.txt"
  prepare scarce-search --source="$corpus/state_union.train.txt" --max_tokens=200000 \
    --val="$corpus/state_union.val.txt"
else
  echo "without the six texts, pydocs alone is run" >&2
fi

if [ "${1:-}" = --quick ]; then
  for stage in runs measure; do work "$stage" --quick; done
  score --quick || true  # without a network: the report has no NER
  python results/tables.py out/quick/report --quick --collect=out/quick
else
  for stage in search runs; do work "$stage"; done
  failed=${failed/ runs/}
  for stage in runs measure; do work "$stage"; done  # some runs begin where others have ended
  score || failed+=" fetch"
  python results/tables.py results --collect=out
fi
if [ -n "$failed" ]; then
  echo "failed in:$failed (see above); the same command again tries it again" >&2
  exit 1
fi
