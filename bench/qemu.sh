#!/usr/bin/env bash
# Measures vmferry beside the real QEMU of Debian's packages, and prints the table of docs/performance.md.
set -euo pipefail
bench=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$bench")

usage() {
    cat <<'END'
bench/qemu.sh: move the same guest by vmferry and by QEMU >= 11.1, in turn, and print a table

usage: bench/qemu.sh [--fetch-only] [--update] [arguments of the measurement...]

  --fetch-only   bring QEMU, print its folder, measure nothing
  --update       ask for a newer QEMU than the one in the cache
  --rounds N     how often each is measured (5); all others: bench/qemu.sh --help-measurement

QEMU is Debian's newest qemu-system-x86 (testing or sid), taken by apt with a configuration of its own from the mirror
that this system's apt uses, and unpacked with all its libraries into a folder of its own. Nothing is installed. Needs
/dev/kvm.

environment:
  VMFERRY_BENCH_CACHE    where QEMU is kept (default: $XDG_CACHE_HOME/vmferry-bench or ~/.cache/vmferry-bench)
  VMFERRY_BENCH_MIRROR   a Debian mirror to use instead of the system's

examples:
  bench/qemu.sh
  bench/qemu.sh --rounds 1 --limits 300 --loads idle
END
}

oldest=11.1
fetch_only=
update=
pass=()
for argument in "$@"; do
    case $argument in
    --fetch-only) fetch_only=yes ;;
    --update) update=yes ;;
    --help-measurement) pass+=(--help) ;;
    -h | --help) usage && exit 0 ;;
    *) pass+=("$argument") ;;
    esac
done

say() { printf 'bench: %s\n' "$*" >&2; }
fail() { say "$*" && exit 1; }

cache=${VMFERRY_BENCH_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/vmferry-bench}

# The newest complete root; a root gets its name only when it is complete.
cached() {
    [ -d "$cache" ] || return 0
    find "$cache" -mindepth 1 -maxdepth 1 -type d -name 'qemu-*' -printf '%f\n' | sort -V | tail -n 1
}

run_qemu() { # ROOT ARGUMENTS...
    local at=$1
    shift
    "$at/usr/lib64/ld-linux-x86-64.so.2" --library-path "$at/usr/lib/x86_64-linux-gnu" \
        "$at/usr/bin/qemu-system-x86_64" "$@"
}

fetch() {
    mkdir -p "$cache"
    exec 9>"$cache/lock"
    flock 9
    # What an interrupted run left: nobody else holds the lock.
    rm -rf "$cache"/tmp.*
    work=$(mktemp -d "$cache/tmp.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    # shellcheck source=lab/apt.sh
    . "$root/lab/apt.sh"
    apt_begin
    newest() {
        apt-cache "${apt_private[@]}" show --no-all-versions qemu-system-x86 |
            sed -n 's/^Version: //p' | head -n 1
    }
    say "asking for the newest QEMU"
    local version
    version=$(apt_find "${VMFERRY_BENCH_MIRROR:-}" newest)
    [ -n "$version" ] || fail "no mirror of this system's apt has testing or sid; name one in VMFERRY_BENCH_MIRROR"
    dpkg --compare-versions "${version#*:}" ge "$oldest" || fail "the newest QEMU is $version, $oldest is needed"

    local name
    name=qemu-$(tr ':~/' '___' <<<"$version")
    if [ -d "$cache/$name" ]; then
        say "$name is the newest"
        return
    fi
    say "downloading QEMU $version and its libraries (about 50 MB)"
    apt-get "${apt_private[@]}" -q -y --download-only install qemu-system-x86 >>"$work/apt.log" 2>&1 || {
        tail -n 5 "$work/apt.log" >&2
        fail "QEMU cannot be downloaded"
    }
    mkdir "$work/root"
    local package
    for package in "$work"/apt/archives/*.deb; do
        dpkg -x "$package" "$work/root"
    done
    run_qemu "$work/root" --version >/dev/null || fail "the QEMU that was unpacked does not run"
    mv "$work/root" "$cache/$name"
}

found=$(cached)
if [ -z "$found" ] || [ -n "$update" ]; then
    # A shell of its own: the lock ends with it.
    (fetch)
    found=$(cached)
fi
if [ -n "$fetch_only" ]; then
    echo "$cache/$found"
    exit 0
fi

[ -r /dev/kvm ] && [ -w /dev/kvm ] || fail "there is no /dev/kvm to be had here"
say "building"
(cd "$root" && cargo build --quiet --release -p vmferry -p bench --bin vmferry --bin qemu >&2)
target=${CARGO_TARGET_DIR:-$root/target}/release
exec "$target/qemu" --qemu-root "$cache/$found" --vmferry "$target/vmferry" "${pass[@]}"
