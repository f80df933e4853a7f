# shellcheck shell=bash disable=SC2034 # sourced, and used there
# Sets BUILDER to what builds images here (docker, else buildah, else podman), and ENGINE to what runs and
# saves them. Docker only where its daemon answers: the client alone builds nothing.
if [ -z "${BUILDER:-}" ]; then
    if docker version --format '{{.Server.Version}}' >/dev/null 2>&1; then BUILDER=docker
    elif command -v buildah >/dev/null; then BUILDER=buildah
    elif command -v podman >/dev/null; then BUILDER=podman
    else
        echo "nothing here builds images: install docker, buildah or podman, or name one in BUILDER" >&2
        exit 1
    fi
fi
ENGINE=$BUILDER
if [ "$BUILDER" = buildah ] && command -v podman >/dev/null; then ENGINE=podman; fi
