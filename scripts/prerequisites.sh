#!/usr/bin/env bash
# Checks that this machine has what the build needs, and installs libclang where it
# may.
#
#   scripts/prerequisites.sh           cargo, a C++ compiler, libclang
#   scripts/prerequisites.sh lint      rustfmt and clippy besides
#
# Prints nothing when everything is there. Otherwise it prints one line on standard
# error and exits with status 1. As root on Debian or Ubuntu it installs libclang with
# apt-get. It installs nothing else but Rust's own components, with rustup.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

refuse() {
    echo "esker: $*" >&2
    exit 1
}

# Standard input belongs to the caller, so nothing here may ask a question.
exec </dev/null

check_cargo() {
    local wanted found
    wanted=$(sed -n 's/^rust-version = "\([0-9.]*\)".*/\1/p' Cargo.toml)
    command -v "${CARGO:-cargo}" >/dev/null ||
        refuse "cargo is missing; install Rust $wanted or later from https://rustup.rs"
    found=$("${CARGO:-cargo}" --version | sed -n 's/^cargo \([0-9]*\.[0-9]*\).*/\1/p')
    [ -n "$found" ] || refuse "cannot tell the version of ${CARGO:-cargo}"
    if [ "${found%%.*}" -lt "${wanted%%.*}" ] ||
        { [ "${found%%.*}" -eq "${wanted%%.*}" ] && [ "${found#*.}" -lt "${wanted#*.}" ]; }; then
        refuse "cargo is $found, Esker needs Rust $wanted or later: rustup update stable"
    fi
}

check_lint() {
    local missing=()
    "${CARGO:-cargo}" fmt --version >/dev/null 2>&1 || missing+=(rustfmt)
    "${CARGO:-cargo}" clippy --version >/dev/null 2>&1 || missing+=(clippy)
    [ ${#missing[@]} -eq 0 ] && return
    command -v rustup >/dev/null ||
        refuse "missing: ${missing[*]}; install them beside cargo, for example with rustup"
    rustup component add "${missing[@]}" >&2 ||
        refuse "rustup could not add ${missing[*]}; its reason is above"
}

check_compilers() {
    local hint="Debian and Ubuntu: apt-get install g++, Fedora: dnf install gcc-c++, macOS: xcode-select --install"
    # RocksDB is C++20; CXX and CC may hold options, too.
    # shellcheck disable=SC2086
    printf '#include <span>\nint main() { return 0; }\n' |
        ${CXX:-c++} -std=c++20 -fsyntax-only -x c++ - >/dev/null 2>&1 ||
        refuse "no C++20 compiler (\`${CXX:-c++}\`); $hint"
    # shellcheck disable=SC2086
    printf 'int main(void) { return 0; }\n' | ${CC:-cc} -fsyntax-only -x c - >/dev/null 2>&1 ||
        refuse "no C compiler (\`${CC:-cc}\`); $hint"
}

# Whether a folder holds libclang itself (not libclang-cpp, another library).
holds_libclang() {
    local file
    for file in "$1"/libclang.so "$1"/libclang.so.* "$1"/libclang-*.so "$1"/libclang-*.so.* \
        "$1"/libclang.dylib; do
        case "$file" in
        *-cpp.*) ;;
        *) [ ! -e "$file" ] || return 0 ;;
        esac
    done
    return 1
}

# libclang alone cannot parse a header. Its own stddef.h comes in another package,
# which may be absent where libclang is only installed for another program, such as
# doxygen.
has_headers() {
    [ -z "${BINDGEN_EXTRA_CLANG_ARGS:-}" ] || return 0
    command -v clang >/dev/null && return 0
    local header
    for header in "$1"/clang/*/include/stddef.h "$1"/../lib*/clang/*/include/stddef.h \
        /usr/lib*/clang/*/include/stddef.h /usr/lib/llvm-*/lib/clang/*/include/stddef.h \
        /usr/local/llvm*/lib*/clang/*/include/stddef.h; do
        [ ! -e "$header" ] || return 0
    done
    return 1
}

# Looks where the bindings' generator will look, in the same order, and nowhere else. A
# library that only this script finds would not help the generator.
find_libclang() {
    local folder prefix
    if [ -n "${LIBCLANG_PATH:-}" ]; then
        [ -d "$LIBCLANG_PATH" ] && folder=$LIBCLANG_PATH || folder=$(dirname "$LIBCLANG_PATH")
        holds_libclang "$folder"
        return
    fi
    {
        if prefix=$("${LLVM_CONFIG_PATH:-llvm-config}" --prefix 2>/dev/null); then
            printf '%s\n' "$prefix/bin" "$prefix/lib" "$prefix/lib64"
        fi
        if [ "$(uname -s)" = Darwin ]; then
            prefix=$(xcode-select --print-path 2>/dev/null) &&
                echo "$prefix/Toolchains/XcodeDefault.xctoolchain/usr/lib"
            printf '%s\n' /Library/Developer/CommandLineTools/usr/lib /usr/local/opt/llvm*/lib
        fi
        printf '%s\n' "${LD_LIBRARY_PATH:-}" "${LIBRARY_PATH:-}" | tr : '\n'
        # The linker's cache names a few folders. The patterns below name hundreds.
        ldconfig -p 2>/dev/null | sed -n 's|.*=> \(/usr/.*\)/libclang[-.].*|\1|p' || true
        printf '%s\n' /usr/local/llvm*/lib* /usr/local/lib*/*/* /usr/local/lib*/* /usr/local/lib* \
            /usr/lib*/*/* /usr/lib*/* /usr/lib*
    } | {
        while IFS= read -r folder; do
            if [ -d "$folder" ] && holds_libclang "$folder" && has_headers "$folder"; then
                # Read the rest, or the writer of this pipe would fail.
                cat >/dev/null
                exit 0
            fi
        done
        exit 1
    }
}

is_debian() {
    command -v apt-get >/dev/null && [ -r /etc/os-release ] &&
        (. /etc/os-release && case " ${ID:-} ${ID_LIKE:-} " in
            *" debian "* | *" ubuntu "*) true ;;
            *) false ;;
        esac)
}

check_libclang() {
    find_libclang && return
    if [ -n "${LIBCLANG_PATH:-}" ]; then
        refuse "LIBCLANG_PATH is $LIBCLANG_PATH, where there is no libclang; correct it, or unset it"
    fi
    if [ "$(id -u)" -eq 0 ] && is_debian; then
        echo "esker: installing libclang-dev, which RocksDB's bindings need, with apt-get" >&2
        export DEBIAN_FRONTEND=noninteractive
        # A package index that cannot be updated may still be good enough.
        apt-get update -qq >&2 || true
        apt-get install -y -qq --no-install-recommends libclang-dev >&2 ||
            refuse "apt-get could not install libclang-dev; its reason is above"
        find_libclang && return
    fi
    refuse "libclang is missing, which RocksDB's bindings need; Debian and Ubuntu: apt-get install libclang-dev," \
        "Fedora: dnf install clang-devel, macOS: brew install llvm, then export LIBCLANG_PATH=\"\$(brew --prefix llvm)/lib\""
}

check_cargo
check_compilers
check_libclang
case "${1:-}" in
"") ;;
lint) check_lint ;;
*) refuse "scripts/prerequisites.sh takes nothing or \`lint\`, not \`$1\`" ;;
esac
