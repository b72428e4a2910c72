#!/bin/bash
# Installs the services that the tests use for real: SLURM with munge, Prometheus, Alertmanager, Chromium. Debian and Ubuntu, as root.
# Quick when all is there; where it cannot install, it says so and leaves those tests to be skipped (failed with CI=true).
set -euo pipefail

PATH="$PATH:/usr/sbin:/sbin"
packages=()
for pair in slurmctld:slurmctld slurmd:slurmd sbatch:slurm-client munged:munge \
  prometheus:prometheus prometheus-alertmanager:prometheus-alertmanager chromium:chromium; do
  command -v "${pair%%:*}" > /dev/null || packages+=("${pair##*:}")
done
if [ ${#packages[@]} -eq 0 ]; then
  echo "services: all installed"
  exit 0
fi
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get > /dev/null; then
  echo "services: ${packages[*]} missing, and this is not root on Debian: tests of them will be skipped"
  exit 0
fi
export DEBIAN_FRONTEND=noninteractive
# The tests start their own daemons; the packages' must not start, least of all in a container without an init.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
  printf '#!/bin/sh\nexit 101\n' > "$policy"
  chmod +x "$policy"
  trap 'rm -f "$policy"' EXIT
fi
apt-get update -qq
apt-get install -y -qq --no-install-recommends "${packages[@]}" > /dev/null
echo "services: installed ${packages[*]}"
