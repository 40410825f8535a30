#!/usr/bin/env bash
# Builds the wheel of the last commit twice, in two folders and at two times; compares the bytes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)
export SOURCE_DATE_EPOCH
for name in first the-second; do
  git clone --quiet . "$work/$name/source"
  python -m pip wheel --quiet --no-deps --wheel-dir "$work/$name" "$work/$name/source"
  sha256sum "$work/$name"/*.whl
  sleep 2
done
cmp "$work/first"/*.whl "$work/the-second"/*.whl
echo "the same bytes"
