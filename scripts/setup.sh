#!/usr/bin/env bash
# Creates .venv with the locked packages and this project (editable). Safe to run again and again: when
# nothing changed it returns at once, and an install that was interrupted is started over.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly LOCK=requirements.lock
readonly CPU_INDEX=https://download.pytorch.org/whl/cpu
readonly PY=.venv/bin/python
readonly STAMP=.venv/kv-agent-stamp  # written last: what is installed
readonly BEGUN=.venv/kv-agent-begun  # there while an install is under way
readonly LOG=.venv/kv-agent-setup.log

export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_PROGRESS_BAR=off

source scripts/apt.sh

wanted_stamp() {
    { cat "$LOCK" pyproject.toml; "$PY" -c 'import sys; print(sys.version)'; pwd -P; } | sha256sum
}

up_to_date() {
    [[ -f $STAMP && -x $PY && ! -e $BEGUN ]] && [[ $(<"$STAMP") == "$(wanted_stamp 2>/dev/null)" ]]
}

# Python 3.11 comes first: the lock was resolved with it.
find_python() {
    local name
    for name in python3.11 python3.12 python3.13 python3 /usr/bin/python3; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            printf '%s\n' "$name"
            return
        fi
    done
    die "no Python 3.11 or newer found: install python3.11 (or newer) and run this again."
}

make_venv() {
    local python version
    python=$(find_python)
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    "$python" -c 'import ensurepip, venv' 2>/dev/null || apt_install "python$version-venv"
    say "creating .venv with Python $version"
    "$python" -m venv --clear --without-pip .venv
    : >"$BEGUN"
    "$PY" -m ensurepip --default-pip >"$LOG" 2>&1 || fail_with_log pip
}

pip_install() { "$PY" -m pip install --quiet --no-deps "$@" >"$LOG" 2>&1; }

fail_with_log() {
    tail -n 20 "$LOG" >&2
    die "$1 could not be installed; pip's last lines are above."
}

install_torch() {
    local requirement
    requirement=$(grep -E '^torch==' "$LOCK")
    say "installing $requirement (a large wheel)"
    pip_install "$requirement" && return
    grep -q 'No matching distribution found' "$LOG" || fail_with_log "$requirement"
    say "not on the default index, trying $CPU_INDEX"
    pip_install --index-url "$CPU_INDEX" "$requirement" || fail_with_log "$requirement"
}

# Shared libraries that vLLM's and torch's compiled parts need from the system. ldd also reports what
# torch brings along itself; only the rest is missing.
missing_libraries() {
    local site
    site=$("$PY" -c 'import sysconfig; print(sysconfig.get_path("platlib"))')
    { ldd "$site"/vllm/*.so "$site"/torch/lib/*.so* 2>/dev/null || true; } |
        awk '/not found/ {print $1}' | sort -u |
        while read -r library; do
            [[ -e $site/torch/lib/$library ]] || printf '%s\n' "$library"
        done
}

check_libraries() {
    local library missing packages=()
    missing=$(missing_libraries)
    for library in $missing; do
        case $library in
            libnuma.so.1) packages+=(libnuma1) ;;
            libgomp.so.1) packages+=(libgomp1) ;;
            libstdc++.so.6) packages+=(libstdc++6) ;;
            libgcc_s.so.1) packages+=(libgcc-s1) ;;
            *) die "the system lacks the shared library $library: install it and run this again." ;;
        esac
    done
    ((${#packages[@]} == 0)) || apt_install "${packages[@]}"
}

up_to_date && exit 0

# One set-up at a time per checkout; the lock is also held by a pip that outlives an interrupted one.
if command -v flock >/dev/null; then
    exec 9<"$LOCK"
    flock -n 9 || { say "waiting for another set-up of this checkout"; flock 9; }
    up_to_date && exit 0
fi

if [[ -e $BEGUN ]]; then
    say "the last set-up was interrupted, starting over"
    make_venv
elif ! "$PY" -m pip --version >/dev/null 2>&1; then
    make_venv
fi

rm -f "$STAMP"
: >"$BEGUN"
install_torch
say "installing the other $(($(grep -c '^[^#]' "$LOCK") - 1)) packages of $LOCK (vLLM is a large wheel)"
pip_install -r "$LOCK" || fail_with_log "$LOCK"
say "installing kv-agent (editable)"
pip_install --no-build-isolation --editable . || fail_with_log kv-agent
rm -f "$BEGUN" "$LOG"  # from here on only the stamp is missing: the next run finds every package in place
check_libraries
wanted_stamp >"$STAMP.new"
mv "$STAMP.new" "$STAMP"
say "done"
