#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Measures mlx-realign on this Mac and writes one file to send back: `sh benchmarks/mac.sh --help`.
for python in python3 python3.13 python3.12 python3.11; do
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        exec "$python" "$(dirname "$0")/mac.py" "$@"
    fi
done
echo "Python 3.11 or newer is needed: none found. brew install python@3.12, or https://www.python.org/downloads/macos" >&2
exit 2
