#!/bin/sh
# Runs of two nodes in a real Slurm on this machine. Installs munge and slurm-wlm where it can; without them, says
# SKIPPED.
#
#   tests/slurm/run.sh      from anywhere in the repository; needs root
set -eu
cd "$(dirname "$0")/../.."

if ! command -v slurmctld slurmd munged srun >/dev/null; then
    if [ "$(id -u)" != 0 ] || ! { apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends slurm-wlm munge; } >/dev/null 2>&1; then
        echo "SKIPPED: runs by Slurm, because munge and slurm-wlm are missing and cannot be installed"
        exit 0
    fi
fi
if [ "$(id -u)" != 0 ]; then
    echo "SKIPPED: runs by Slurm, because its daemons need root"
    exit 0
fi
quintet=$(cargo build --release --package quintet-cli --bin quintet --message-format=json |
    sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' | tail -n 1)
timeout --kill-after=30 420 tests/slurm/cluster.sh tests/slurm/cases.sh "$quintet"
