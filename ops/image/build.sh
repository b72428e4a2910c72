#!/usr/bin/env bash
# Builds the image from the Dockerfile, with what pip uses on this machine handed over as build secrets.
#   BASE=... WHEELS=FOLDER ops/image/build.sh NAME
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.."
# shellcheck source=ops/image/engine.sh
. "$here/engine.sh"

name=${1:?NAME: what the image is called}
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" "$here/pip_settings.py" "$work"
wheels=${WHEELS:-$work/wheels}
options=(
  --secret "id=pip,src=$work/pip.conf" --secret "id=pip-ca,src=$work/ca.pem" --build-context "wheels=$wheels"
  --build-arg "VERSION=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)"
  --build-arg "REVISION=$(git describe --always --dirty --abbrev=40 2> /dev/null || echo unknown)"
  --tag "$name" --file Dockerfile
)
[ -z "${BASE:-}" ] || options+=(--build-arg "BASE=$BASE")
if [ "$ENGINE" = docker ]; then
  DOCKER_BUILDKIT=1 docker build --network host "${options[@]}" .
else
  # chroot: builds where no namespaces can be made, inside of another container
  nice -n 5 buildah build --isolation chroot --network host --layers "${options[@]}" .
fi
