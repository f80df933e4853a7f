#!/usr/bin/env bash
# Writes the image's bill of materials: every Python package and every package of the distribution in it, with version,
# licence and layer, as CycloneDX JSON. Needs no network. `make sbom` calls it.
set -euo pipefail
cd "$(dirname "$0")/.."
. image/builder.sh
: "${IMAGE:=qlora-job}" "${SBOM:=sbom.cdx.json}"

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
case $ENGINE in
    buildah) buildah push --quiet "$IMAGE" "docker-archive:$folder/image.tar" ;;
    podman) podman save --quiet --format docker-archive --output "$folder/image.tar" "$IMAGE" ;;
    docker) docker save --output "$folder/image.tar" "$IMAGE" ;;
esac
SYFT_CHECK_FOR_APP_UPDATE=false .venv/bin/syft scan --quiet "docker-archive:$folder/image.tar" \
    --source-name "$IMAGE" --output "cyclonedx-json=$SBOM"
for kind in pypi deb cargo; do
    echo "$SBOM: $(grep -o "\"purl\":\"pkg:$kind/" "$SBOM" | wc -l) packages of kind $kind"
done
