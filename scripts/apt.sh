# What scripts need that install system packages; sourced by them.

readonly SCRIPT=${0##*/}

say() { printf '%s: %s\n' "${SCRIPT%.sh}" "$*"; }
die() { say "$@" >&2; exit 1; }

# apt_install PACKAGE...: as root on Debian or Ubuntu; elsewhere one sentence says what is missing.
apt_install() {
    local output
    if [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
        die "missing system packages: install $* (Debian and Ubuntu: apt-get install $*) and run this again."
    fi
    say "installing $* with apt-get"
    if ! output=$({
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"
    } 2>&1); then
        tail -n 20 <<<"$output" >&2
        die "apt-get could not install $*: install it by hand and run this again."
    fi
}
