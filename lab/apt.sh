# Sourced: apt with a configuration, lists and packages of its own, which touches nothing of the system's. Callers have
# `say`, `fail` and `work`, a folder of their own.

apt_private=()
apt_keyring=

# Prepares $work/apt; every call of apt takes "${apt_private[@]}" from then on.
apt_begin() {
    command -v apt-get >/dev/null || fail "apt-get is missing: what is needed comes as Debian packages"
    mkdir -p "$work/apt/lists/partial" "$work/apt/archives/partial" "$work/apt/parts"
    : >"$work/apt/status"
    apt_private=(
        -o "Dir::Etc::SourceList=$work/apt/sources.list"
        -o "Dir::Etc::SourceParts=$work/apt/parts"
        -o "Dir::Etc::Preferences=$work/apt/none"
        -o "Dir::Etc::PreferencesParts=$work/apt/parts"
        -o "Dir::State::Lists=$work/apt/lists"
        -o "Dir::State::Status=$work/apt/status"
        -o "Dir::Cache::Archives=$work/apt/archives"
        -o "Dir::Cache::pkgcache="
        -o "Dir::Cache::srcpkgcache="
        -o "APT::Sandbox::User="
        -o "APT::Install-Recommends=false"
        -o "Acquire::Languages=none"
        -o "Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled=false"
        -o "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false"
        -o "Acquire::Retries=3"
    )
    local candidate
    for candidate in /usr/share/keyrings/debian-archive-keyring.{pgp,gpg}; do
        [ -e "$candidate" ] && apt_keyring=$candidate && break
    done
    [ -n "$apt_keyring" ] || fail "Debian's keys are missing: install debian-archive-keyring"
}

# Where this system's packages come from, told without asking any of them, also where lists were never fetched;
# archives of security updates have no testing. A mirror that is named goes before.
apt_mirrors() { # NAMED
    if [ -n "$1" ]; then
        echo "${1%/}"
    else
        apt-get -o "Dir::State::Lists=$work/apt/lists" update --print-uris |
            sed -n "s#^'\(.*\)/dists/.*/InRelease'.*#\1#p" | grep -v -- '-security$' | sort -u
    fi
}

# Asks mirror after mirror for testing and sid, until COMMAND finds something there: that is printed.
apt_find() { # NAMED-MIRROR COMMAND
    local mirror suite found
    while read -r mirror; do
        for suite in testing sid; do
            echo "deb [signed-by=$apt_keyring] $mirror $suite main"
        done >"$work/apt/sources.list"
        if apt-get "${apt_private[@]}" -q -o APT::Update::Error-Mode=any update >"$work/apt.log" 2>&1; then
            found=$("$2")
            [ -n "$found" ] && echo "$found" && return
        fi
        tail -n 5 "$work/apt.log" >&2
    done < <(apt_mirrors "$1")
}
