#!/bin/sh
# Writes runtime.lock, dev.lock and gpu.lock anew from their .in files (`make lock`).
# Pins already there are kept as long as they satisfy the inputs; UPGRADE=1 takes the newest.
# uv resolves for every platform and Python version at once, which pip can't.
set -eu
cd "$(dirname "$0")"
UV=${UV:-uv}
upgrade=${UPGRADE:+--upgrade}

compile() {  # compile NAME LEFT-OUT [more arguments]
    name=$1; left_out=$2; shift 2
    # shellcheck disable=SC2086  # $upgrade is one flag or none.
    "$UV" pip compile "$name.in" --override "$left_out" --universal --python-version 3.11 \
        --generate-hashes --no-emit-index-url --no-annotate --no-header --quiet \
        $upgrade "$@" --output-file "$name.lock"
    # A requirement and its hashes are one logical line; the ones left out go with theirs.
    # Without it, pip would want the hashes' files of what is never installed.
    awk '/^[^ ]/ { drop = /sys_platform == .never./ } !drop' "$name.lock" > "$name.lock.new"
    mv "$name.lock.new" "$name.lock"
}

compile runtime left-out.txt
compile dev left-out.txt --constraint runtime.lock
compile gpu left-out-gpu.txt
