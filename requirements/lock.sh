#!/bin/sh
# Writes runtime.lock and dev.lock anew from runtime.in and dev.in (`make lock`).
# Pins already there are kept as long as they satisfy the inputs; UPGRADE=1 takes the newest.
# uv resolves for every platform and Python version at once, which pip can't.
set -eu
cd "$(dirname "$0")"
UV=${UV:-uv}
upgrade=${UPGRADE:+--upgrade}

compile() {  # compile NAME [more arguments]
    name=$1; shift
    # shellcheck disable=SC2086  # $upgrade is one flag or none.
    "$UV" pip compile "$name.in" --override left-out.txt --universal --python-version 3.11 \
        --generate-hashes --no-emit-index-url --no-annotate --no-header --quiet \
        $upgrade "$@" --output-file "$name.lock"
    # A requirement and its hashes are one logical line; the ones left out go with theirs.
    # Without it, pip would want the hashes' files of what is never installed.
    awk '/^[^ ]/ { drop = /sys_platform == .never./ } !drop' "$name.lock" > "$name.lock.new"
    mv "$name.lock.new" "$name.lock"
}

compile runtime
compile dev --constraint runtime.lock
