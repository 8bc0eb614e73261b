#!/usr/bin/env bash
# Builds the lab's kernel once, and prints the folder of its tree: bzImage, Module.symvers, all that modules need.
# Progress goes to standard error. See docs/lab.md.
set -euo pipefail
lab=$(cd "$(dirname "$0")" && pwd)

usage() {
    cat <<'END'
lab/kernel.sh: build the lab's kernel once and print the folder of its tree

usage: lab/kernel.sh [--update]

  --update   ask for a newer linux-source-7.x package although a kernel of this configuration is in the cache

The source is Debian's newest linux-source-7.x (testing or sid), taken by apt with a configuration of its own from the
mirror that this system's apt uses. The system's sources and lists stay as they are.

environment:
  VMFERRY_LAB_CACHE    where kernels are kept (default: $XDG_CACHE_HOME/vmferry-lab or ~/.cache/vmferry-lab)
  VMFERRY_LAB_MIRROR   a Debian mirror to use instead of the system's
  VMFERRY_LAB_JOBS     compilers at once (default: as many as there are processors)

example:
  make -C "$(lab/kernel.sh)" M="$PWD/lab/ferrydev" modules
END
}

update=
for argument in "$@"; do
    case $argument in
    --update) update=yes ;;
    -h | --help) usage && exit 0 ;;
    *) usage >&2 && exit 2 ;;
    esac
done

say() { printf 'lab: %s\n' "$*" >&2; }
fail() { say "$*" && exit 1; }

cache=${VMFERRY_LAB_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/vmferry-lab}
jobs=${VMFERRY_LAB_JOBS:-$(nproc)}
# Comments do not make another kernel.
hash=$(sed -e 's/#.*//' -e '/^[[:space:]]*$/d' "$lab/kernel.config" | sha256sum | cut -c1-12)

# The newest complete tree of this configuration; a tree gets its name only when it is complete.
cached() {
    [ -d "$cache" ] || return 0
    find "$cache" -mindepth 1 -maxdepth 1 -type d -name "kernel-*-$hash" -printf '%f\n' | sort -V | tail -n 1
}

found=$(cached)
if [ -n "$found" ] && [ -z "$update" ]; then
    echo "$cache/$found/build"
    exit 0
fi

mkdir -p "$cache"
exec 9>"$cache/lock"
if ! flock --nonblock 9; then
    say "another run builds the kernel; waiting for it"
    flock 9
    found=$(cached)
    if [ -n "$found" ]; then
        echo "$cache/$found/build"
        exit 0
    fi
fi

# What an interrupted run left: nobody else holds the lock.
rm -rf "$cache"/tmp.*
work=$(mktemp -d "$cache/tmp.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# --- apt with a configuration of its own

# shellcheck source=lab/apt.sh
. "$lab/apt.sh"
apt_begin

newest() {
    apt-cache "${apt_private[@]}" pkgnames linux-source-7. | grep -E '^linux-source-7\.[0-9]+$' | sort -V | tail -n 1
}

say "asking for the newest linux-source-7.x"
package=$(apt_find "${VMFERRY_LAB_MIRROR:-}" newest)
[ -n "$package" ] || fail "no mirror of this system's apt has a linux-source-7.x; name a Debian mirror in VMFERRY_LAB_MIRROR"

version=$(apt-cache "${apt_private[@]}" show --no-all-versions "$package" | sed -n 's/^Version: //p' | head -n 1 | tr ':~/' '___')
name=kernel-$version-$hash
if [ -d "$cache/$name" ]; then
    say "$name is the newest"
    echo "$cache/$name/build"
    exit 0
fi

say "downloading $package $version (about 150 MB)"
(cd "$work" && apt-get "${apt_private[@]}" -q download "$package" >>"$work/apt.log" 2>&1) || {
    tail -n 5 "$work/apt.log" >&2
    fail "$package cannot be downloaded"
}

# --- unpack, configure, build

say "unpacking"
mkdir -p "$work/kernel/build"
# The archive's own name is the one file of that form in the package.
dpkg-deb --fsys-tarfile "$work/$package"_*.deb |
    tar -x --to-stdout --wildcards './usr/src/linux-source-*.tar.xz' |
    tar -xJ --strip-components=1 -C "$work/kernel/build"
rm -f "$work/$package"_*.deb

cd "$work/kernel/build"
quietly() {
    "$@" >>"$work/make.log" 2>&1 || {
        grep -n -i -E 'error|missing|not found' "$work/make.log" | tail -n 10 >&2
        tail -n 15 "$work/make.log" >&2
        fail "this failed: $*"
    }
}
say "configuring"
quietly make tinyconfig
quietly scripts/kconfig/merge_config.sh -m .config "$lab/kernel.config"
quietly make olddefconfig
grep -E '^CONFIG_[A-Z0-9_]+=' "$lab/kernel.config" | while read -r line; do
    grep -qxF "$line" .config || fail "$line did not take effect: another option it depends on is missing or has a new name"
done

say "building with $jobs at once; ten minutes or so on two processors"
start=$SECONDS
progress() { # counts what is compiled, every half minute
    local last=$start count=0 line
    while read -r line; do
        printf '%s\n' "$line" >>"$work/make.log"
        case $line in *CC\ * | *AS\ *) count=$((count + 1)) ;; esac
        if [ $((SECONDS - last)) -ge 30 ]; then
            last=$SECONDS
            say "  $count files, $((SECONDS - start)) s"
        fi
    done
}
nice make -j"$jobs" bzImage modules 2>&1 | progress || {
    grep -n -E '[Ee]rror' "$work/make.log" | tail -n 10 >&2
    tail -n 15 "$work/make.log" >&2
    fail "the kernel does not build"
}
for file in Module.symvers arch/x86/boot/bzImage; do
    [ -s "$file" ] || fail "the build left no $file"
done
mv "$work/make.log" "$work/kernel/make.log"

# What modules are not built from makes most of the tree.
rm -rf Documentation sound net fs .tmp_vmlinux*
find drivers -mindepth 1 -maxdepth 1 ! -name vfio ! -name iommu -exec rm -rf {} +

# Complete: only now it gets its name.
mv "$work/kernel" "$cache/$name"
say "built in $((SECONDS - start)) s: $name"
echo "$cache/$name/build"
