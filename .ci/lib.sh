# What .ci/run and .ci/nightly share; sourced by them after they have set
#   STEP_SECONDS      a step that takes longer is stopped
#   PYTHON_ALLOCATOR  Python's under the sanitizers
# Leaves the project's root as the working directory.

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$project"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
bin=$project/.venv/bin # where the README's commands install

# Real Linux guests under QEMU, where the folder that builds them lies beside the project. Building takes root.
rig=$(dirname "$project")/shared/rig
if [ -d "$rig" ] && [ "$(id -u)" = 0 ]; then export PVFIO_RIG=$rig; fi
rig_builder=

export CI=${CI:-true} PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

stage() {
    printf '\n== %s (after %d s)\n' "$1" "$SECONDS"
}

limited() {
    timeout --kill-after=30 "$STEP_SECONDS" "$@" </dev/null
}

has_python_headers() {
    [ -e "$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ]
}

# python3 with venv and headers, gcc with the C library's headers: what the README asks for; and what tests compare with.
install_missing_system_tools() {
    local missing=()
    command -v gcc >/dev/null || missing+=(gcc libc6-dev)
    command -v python3 >/dev/null || missing+=(python3 python3-venv python3-dev)
    if command -v python3 >/dev/null; then
        python3 -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
        has_python_headers || missing+=(python3-dev)
    fi
    # What pvfio is compared with: a file system's own tools, and the real fio.
    command -v mkfs.ext4 >/dev/null || missing+=(e2fsprogs)
    command -v fio >/dev/null || missing+=(fio)
    if [ -n "${PVFIO_RIG:-}" ]; then # and what builds a guest
        command -v debootstrap >/dev/null || missing+=(debootstrap)
        command -v cpio >/dev/null || missing+=(cpio)
        command -v xz >/dev/null || missing+=(xz-utils)
        python3 -m pip --version >/dev/null 2>&1 || missing+=(python3-pip)
    fi
    if [ "${#missing[@]}" -gt 0 ]; then
        apt-get -q update
        DEBIAN_FRONTEND=noninteractive apt-get -qy install --no-install-recommends "${missing[@]}"
    fi
}

# Builds the guest in the background, once a machine; wait_for_rig is where it must be there.
start_rig() {
    if [ -n "${PVFIO_RIG:-}" ] && [ ! -s "${RIG:-${XDG_CACHE_HOME:-$HOME/.cache}/pvfio-rig}/guest.ext4" ]; then
        build_rig &
        rig_builder=$!
    fi
}

# Finished steps are kept, so a second try goes on where a download failed.
build_rig() {
    local try
    for try in 1 2; do
        if limited bash "$PVFIO_RIG/make-rig.sh" >"$scratch/rig$try.log" 2>&1; then return 0; fi
    done
    return 1
}

# Where it cannot be built (no network, no mounts) the tests that need it say that they are skipped.
wait_for_rig() {
    if [ -n "$rig_builder" ] && ! wait "$rig_builder"; then
        tail -n 40 "$scratch"/rig*.log
        printf 'NO GUEST: %s could not be built, its tests are skipped\n' "$PVFIO_RIG"
        unset PVFIO_RIG
    fi
}

# The N-th of the README's commands, as it stands.
readme_command() {
    local command
    command=$(python3 .ci/readme_commands.py "$1")
    printf '$ %s\n' "$command"
    limited bash -e -o pipefail -c "$command"
}

build_sanitized() {
    PVFIO_SANITIZE=address,undefined "$bin/python" setup.py -q build \
        --build-base "$scratch/sanitized" --build-lib "$scratch/sanitized/lib"
}

# A command that uses the sanitized build in place of the installed one, stopping at the first finding. Python's leaks are
# not ours; its own allocator would hide overruns of small blocks, so PYTHON_ALLOCATOR is another one: "malloc", all of it
# under ASan, or "pymalloc_debug", which finds what was written beside a block, in half the time.
with_sanitizers() {
    limited env \
        PYTHONPATH="$scratch/sanitized/lib" PYTHONMALLOC="$PYTHON_ALLOCATOR" \
        LD_PRELOAD="$(gcc -print-file-name=libasan.so):$(gcc -print-file-name=libubsan.so)" \
        ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
        "$@"
}

# The tests that touch C, once more. pytest's fault handler would take the sanitizers' signals, and its capture of file
# descriptors would swallow their last words.
test_sanitized() {
    with_sanitizers "$bin/python" -P -c "
import pathlib, pvfio._native as native
assert pathlib.Path(native.__file__).is_relative_to('$scratch'), native.__file__
assert b'__asan_init' in pathlib.Path(native.__file__).read_bytes(), 'not a sanitized build'"
    with_sanitizers "$bin/pytest" -m touches_c --capture=sys -p no:faulthandler -p no:cacheprovider "$@"
}
