#!/bin/sh
# Makes the environment of others' routers: peers.sh PYTHON FOLDER
# One that can't be installed is left out, and `make bench-peers` says so in its row.
set -eu
python=$1
folder=$2
here=$(cd "$(dirname "$0")" && pwd)

[ -x "$folder/bin/python" ] || "$python" -m venv "$folder"
log=$folder/install.log
pip() {
    "$folder/bin/python" -m pip --disable-pip-version-check --no-input "$@" >>"$log" 2>&1
}
: >"$log"
if ! pip install -qq --no-deps -r "$here/peers.txt"; then
    grep -v '^#' "$here/peers.txt" | while read -r package; do
        pip install -qq --no-deps "$package" || echo "peers: no $package (see $log)" >&2
    done
fi
