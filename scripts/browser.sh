#!/usr/bin/env bash
# Brings the Chromium that the tests of the page at /memory/ui drive: Debian's own, as root. Without one those
# tests are skipped, so this never fails.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source scripts/apt.sh

for name in chromium chromium-browser google-chrome; do
    command -v "$name" >/dev/null && exit 0
done

(apt_install chromium) || say "no Chromium: the tests of the page at /memory/ui will be skipped."
