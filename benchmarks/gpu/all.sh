#!/usr/bin/env bash
# All measurements of one GPU in three calls of less than ten minutes: bash benchmarks/gpu/all.sh 1 (then 2, then 3)
# JSON goes to $OUT, or to benchmarks/results. README.md beside this tells what each call does and how long it takes.
set -u
cd "$(dirname "$0")/../.." || exit 1
out=${OUT:-benchmarks/results}
export PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
failed=0

# limit in seconds, script, name of its JSON, and its arguments; what ran before the limit is in the JSON
run() {
    echo "== $2 ($3), at most $1 s"
    timeout "$1" "$python" "benchmarks/gpu/$2.py" --out "$out/$3.json" "${@:4}" || { echo "$3: ended with $?"; failed=1; }
}

case ${1:-} in
1)
    run 60 ceilings gpu-ceilings
    run 110 attention gpu-attention
    run 120 memory gpu-memory --minutes 1
    run 270 stage1 gpu-stage1 --minutes 3.5 --parts dora lora checkpointing passes
    ;;
2)
    run 330 stage2 gpu-stage2 --minutes 4 --parts pairs levers
    run 220 stage1 gpu-stage1-compile --minutes 3 --parts compile
    ;;
3)
    run 330 encode gpu-encode --minutes 4
    run 230 stage2 gpu-stage2-whole --minutes 1 --parts whole-reference
    ;;
*)
    echo "usage: $0 1|2|3"
    exit 2
    ;;
esac
exit $failed
