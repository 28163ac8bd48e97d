#!/bin/sh
# Make a virtual environment: venv.sh PYTHON FOLDER. Says what is missing, and installs it where it may.
set -eu
python=$1 folder=$2

if ! command -v "$python" >/dev/null 2>&1; then
    echo "make: $python is not installed: VPN Sentinel needs Python 3.11 or newer" >&2
    exit 1
fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "make: $("$python" --version) is too old: VPN Sentinel needs Python 3.11 or newer (make PYTHON=python3.12)" >&2
    exit 1
fi
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    # Debian and Ubuntu keep venv in a package of its own.
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
        echo "installing python3-venv"
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends python3-venv >/dev/null
    else
        echo "make: this Python has no venv: apt-get install python3-venv" >&2
        exit 1
    fi
fi
echo "creating $folder"
exec "$python" -m venv "$folder"
