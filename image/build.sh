#!/usr/bin/env bash
# Builds the image and prints its size layer by layer. `make image` calls it; docs/image.md has the variables.
set -euo pipefail
cd "$(dirname "$0")/.."
. image/builder.sh
: "${IMAGE:=qlora-job}"

arguments=(
    --tag "$IMAGE"
    --build-arg "VERSION=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' job/__init__.py)"
    --build-arg "REVISION=${REVISION:-$(git describe --always --abbrev=40 --dirty --exclude '*' 2>/dev/null || true)}"
    --build-arg "CREATED=$(date --utc +%Y-%m-%dT%H:%M:%SZ)"
)
for name in BASE_IMAGE LOCK EXTRA_INDEX_URL SOURCE; do
    if [ -n "${!name:-}" ]; then arguments+=(--build-arg "$name=${!name}"); fi
done
case $BUILDER in
    docker) build=(docker build) ;;
    # In a chroot nothing else is needed: no daemon, no cgroups, no other user ids.
    *) build=("$BUILDER" build --isolation chroot --layers --force-rm) ;;
esac
# Flags, not words: BUILD_FLAGS is split on purpose.
# shellcheck disable=SC2086
DOCKER_BUILDKIT=1 "${build[@]}" "${arguments[@]}" ${BUILD_FLAGS:-} .

echo
if [ "$ENGINE" = buildah ]; then
    buildah images "$IMAGE" # it does not list the layers; podman and docker do
    exit
fi
echo "$IMAGE, from the base up:"
# `history` names a layer by its step; steps that add nothing are left out.
"$ENGINE" history --no-trunc --format '{{.Size}}|{{.CreatedBy}}' "$IMAGE" | tac \
    | sed -e 's/\s\+/ /g' -e 's/|\/bin\/sh -c #(nop) /|/' -e 's/|\/bin\/sh -c /|RUN /' -e 's/ # buildkit$//' \
        -e 's/ \(dir\|file\|multi\):[0-9a-f]\+ in / to /' \
    | awk -F'|' '$1 !~ /^0 ?B$/ && NF > 1 { printf "%10s  %.100s\n", $1, $2 }'
"$ENGINE" image inspect --format '{{.Size}}' "$IMAGE" | awk '{ printf "%7.2f GB  in all\n", $1 / 1e9 }'
