#!/bin/sh
# Install the Debian packages that are named and missing; with --report only say what will be left out without them.
set -eu
report=no
if [ "${1:-}" = --report ]; then
    report=yes
    shift
fi
missing=
for package in "$@"; do
    # Some names are virtual or newer elsewhere: a command of that name will do.
    if ! dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed'; then
        missing="$missing $package"
    fi
done
if [ "$report" = yes ]; then
    echo "not root: the acceptance tests are left out, for they make network namespaces (make test as root runs them)"
    [ -z "$missing" ] || echo "not root: these packages are not installed either:$missing"
    exit 0
fi
[ -n "$missing" ] || exit 0
echo "installing$missing"
apt-get update -qq
# shellcheck disable=SC2086 # a list of words is meant
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
