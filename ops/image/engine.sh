# shellcheck shell=bash
# Sourced. Sets ENGINE, which runs images: podman, beside buildah to build them, or docker.
if [ -z "${ENGINE:-}" ]; then
  if command -v podman > /dev/null && command -v buildah > /dev/null; then
    ENGINE=podman
  elif command -v docker > /dev/null && docker info > /dev/null 2>&1; then
    ENGINE=docker
  else
    echo "neither podman with buildah nor docker's engine is here: apt-get install podman buildah runc" >&2
    exit 2
  fi
fi
