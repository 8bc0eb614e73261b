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

QEMU is Debian's newest qemu-system-x86 (testing or sid) from the mirror that this system's apt uses, installed by
debootstrap into a root of its own: about 75 MB to download, 450 MB while it is made, 290 MB kept, about a minute. Where
debootstrap is not installed, it comes from the same mirror and goes again. It needs root, chroot, mount namespaces and
device nodes. Where one of them is missing, apt downloads QEMU and its libraries, and they are unpacked without being
installed: about 45 MB, 190 MB kept, some twenty seconds; the same files run. Nothing is installed into this system. The
measurement needs /dev/kvm.

environment:
  VMFERRY_BENCH_CACHE    where QEMU is kept (default: $XDG_CACHE_HOME/vmferry-bench or ~/.cache/vmferry-bench): root-VERSION
                         as debootstrap makes it, unpacked-VERSION otherwise
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

# The newest complete root, of one version that of debootstrap; a root gets its name only when it is complete.
cached() {
    [ -d "$cache" ] || return 0
    find "$cache" -mindepth 1 -maxdepth 1 -type d \( -name 'root-*' -o -name 'unpacked-*' \) -printf '%f\n' |
        sort -t - -k 2V -k 1,1r | tail -n 1
}

run_qemu() { # ROOT ARGUMENTS...
    local at=$1
    shift
    "$at/usr/lib64/ld-linux-x86-64.so.2" --library-path "$at/usr/lib/x86_64-linux-gnu" \
        "$at/usr/bin/qemu-system-x86_64" "$@"
}

# Installs QEMU into $work/root by debootstrap.
make_root() { # VERSION
    [ "$(id -u)" = 0 ] || { say "debootstrap needs root" && return 1; }
    # Its mounts and processes end with it, however it ends: what removes the root later never meets a mounted /proc.
    local apart=(unshare --mount --pid --fork --kill-child)
    "${apart[@]}" true 2>>"$work/debootstrap.log" || { say "debootstrap needs mount namespaces" && return 1; }

    local debootstrap folder=
    if ! debootstrap=$(command -v debootstrap); then
        (cd "$work" && apt-get "${apt_private[@]}" -q download debootstrap >>"$work/debootstrap.log" 2>&1) || {
            say "debootstrap cannot be downloaded"
            return 1
        }
        dpkg -x "$work"/debootstrap_*.deb "$work/debootstrap" || return
        debootstrap=$work/debootstrap/usr/sbin/debootstrap
        folder=$work/debootstrap/usr/share/debootstrap
    fi
    local mirror suite
    read -r _ _ mirror _ <"$work/apt/sources.list"
    suite=$(apt-cache "${apt_private[@]}" madison qemu-system-x86 |
        awk -v version="$1" '$3 == version && !seen++ { sub("/.*", "", $6); print $6 }')

    say "installing QEMU $1 into a root of its own by debootstrap: about 75 MB to download, about a minute"
    # A half-made root is thrown away: no need to wait for the disk at each package. Not --foreign: that unpacks only the
    # base system.
    DPKG_FORCE=unsafe-io DEBOOTSTRAP_DIR=${folder:-${DEBOOTSTRAP_DIR:-/usr/share/debootstrap}} "${apart[@]}" \
        "$debootstrap" --variant=minbase --include=qemu-system-x86 --keyring="$apt_keyring" "$suite" "$work/root" \
        "$mirror" >>"$work/debootstrap.log" 2>&1 9>&- || {
        tail -n 5 "$work/debootstrap.log" >&2
        say "debootstrap failed"
        return 1
    }
    rm -rf "$work"/root/var/cache/apt/* "$work"/root/var/lib/apt/lists/*
}

# Unpacks QEMU and its libraries into $work/root.
make_unpacked() { # VERSION
    say "downloading QEMU $1 and its libraries, to be unpacked only: about 45 MB"
    apt-get "${apt_private[@]}" -q -y --download-only install qemu-system-x86 >>"$work/apt.log" 2>&1 || {
        tail -n 5 "$work/apt.log" >&2
        say "QEMU cannot be downloaded"
        return 1
    }
    mkdir "$work/root"
    local package
    for package in "$work"/apt/archives/*.deb; do
        dpkg -x "$package" "$work/root" || return
    done
}

fetch() {
    mkdir -p "$cache"
    exec 9>"$cache/lock"
    flock 9
    # What an interrupted run left: nobody else holds the lock.
    rm -rf "$cache"/tmp.*
    work=$(mktemp -d "$cache/tmp.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    # debootstrap answers an interrupt by failing, which is no reason to go on the other way.
    trap 'exit 130' INT
    trap 'exit 143' TERM
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

    local way name
    for way in root unpacked; do
        name=$way-$(tr ':~/' '___' <<<"$version")
        if [ -d "$cache/$name" ]; then
            say "$name is the newest"
            return
        fi
        if "make_$way" "$version" && run_qemu "$work/root" --version >/dev/null; then
            mv "$work/root" "$cache/$name"
            return
        fi
        rm -rf "$work/root"
    done
    fail "no QEMU that runs can be had"
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
