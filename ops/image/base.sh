#!/usr/bin/env bash
# A small Debian base image made of Debian's own packages, where no registry of images can be reached. As root.
#   ops/image/base.sh NAME [SUITE]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=ops/image/engine.sh
. "$here/engine.sh"

name=${1:?NAME: what the image is called}
# the last Debian with python3.11
suite=${2:-bookworm}
[ "$(id -u)" -eq 0 ] || { echo "debootstrap wants root: run this as root, or take a base from a registry (BASE=...)" >&2; exit 2; }
command -v debootstrap > /dev/null || { echo "debootstrap is missing: apt-get install debootstrap" >&2; exit 2; }

# where this machine's own packages come from; debootstrap has a default for machines of another kind
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' "Codename: $suite" 2> /dev/null | head -n 1)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
nice -n 5 debootstrap --variant=minbase --include=ca-certificates "$suite" "$work/root" ${mirror:+"$mirror"} > "$work/log" \
  || { tail -n 20 "$work/log" >&2; exit 1; }
rm -rf "$work"/root/var/lib/apt/lists/* "$work"/root/var/cache/apt/archives/*.deb "$work"/root/var/log/*.log \
  "$work"/root/var/cache/ldconfig/* "$work"/root/usr/share/doc/* "$work"/root/usr/share/man/*
tar -C "$work/root" --numeric-owner -c . | "$ENGINE" import --change 'CMD ["/bin/bash"]' - "$name"
