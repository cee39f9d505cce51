#!/usr/bin/env bash
# What the images install, in parts that can be run and tested without a container engine.
#
#   install.sh torch-constraints                         what pip must leave as it is, to stdout
#   install.sh packages VENV CONSTRAINTS REQUIREMENT     REQUIREMENT into VENV, above the image's torch
#   install.sh flash-attn VENV PYPROJECT                 build flash-attn unless the image has it
#
# NVIDIA's image brings its own build of torch. It stays: packages go into a virtual environment that
# sees the image's, so nothing of the image is removed or overwritten, and pip is held to the versions
# of torch and its companions that it finds.
set -euo pipefail

# The image's own constraints name versions of far more than torch, against constraints.txt.
unset PIP_CONSTRAINT
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

fail() {
    echo "install.sh: $1" >&2
    exit 1
}

# `pip freeze` would name the files that the image's wheels came from; those are gone.
torch_constraints() {
    local found
    found=$(python3 -m pip list --format=freeze |
        grep -i -E '^(torch|torchvision|torchaudio|triton|pytorch-triton|flash[-_]attn|nvidia-[^=]*)==') || true
    grep -q -i '^torch==' <<< "$found" || fail "no torch in this image"
    echo "$found"
}

torch_version() {
    "$1" -c 'from importlib.metadata import version; print(version("torch"))'
}

packages() {
    local venv=$1 constraints=$2 requirement=$3 before after
    before=$(torch_version python3)
    # The image may lack ensurepip; its own pip serves the environment as well.
    python3 -m venv --without-pip --system-site-packages "$venv"
    torch_constraints > "$venv/torch-constraints.txt"
    "$venv/bin/python" -m pip install --progress-bar off --constraint "$venv/torch-constraints.txt" \
        --constraint "$constraints" "$requirement"
    after=$(torch_version "$venv/bin/python")
    [[ $after == "$before" ]] || fail "torch $before became $after"
}

flash_attn() {
    local venv=$1 pyproject=$2 requirement
    if "$venv/bin/python" -c 'import flash_attn'; then
        echo "flash-attn: the image's"
        return
    fi
    requirement=$("$venv/bin/python" -c '
import sys, tomllib
with open(sys.argv[1], "rb") as file:
    print(*tomllib.load(file)["project"]["optional-dependencies"]["flash"])' "$pyproject")
    # Ready wheels are built for PyTorch's releases, not for the image's build of it.
    FLASH_ATTENTION_FORCE_BUILD=TRUE MAX_JOBS=${MAX_JOBS:-8} "$venv/bin/python" -m pip install \
        --progress-bar off --no-build-isolation --no-deps "$requirement"
    "$venv/bin/python" -c 'import flash_attn' || fail "flash-attn was built and does not import"
}

case ${1:-} in
    torch-constraints) torch_constraints ;;
    packages) packages "$2" "$3" "$4" ;;
    flash-attn) flash_attn "$2" "$3" ;;
    *) fail "unknown part '${1:-}': torch-constraints, packages or flash-attn" ;;
esac
