#!/bin/sh
# Make the virtual environment $1, unless a working one is there.
# $2: the Python to make it with; default: the first suitable one.
set -eu

ENV=$1
if "$ENV/bin/python" -m pip --version >/dev/null 2>&1; then
    exit 0
fi

for candidate in ${2:+"$2"} python3 python3.13 python3.12 python3.11 \
        python3.10 python; do
    if "$candidate" -c 'import sys
sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
        echo "setup: making $ENV with $candidate"
        # Debian's Python comes without ensurepip: its pip can put a pip there.
        "$candidate" -m venv --clear "$ENV" >/dev/null 2>&1 || {
            "$candidate" -m venv --clear --without-pip "$ENV"
            "$candidate" -m pip --python "$ENV/bin/python" install -q pip
        }
        exit 0
    fi
done
echo 'setup: found no Python 3.10 to 3.13; run make with' \
    'PYTHON=/path/to/python3.12.' >&2
exit 1
