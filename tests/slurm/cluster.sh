#!/bin/sh
# A Slurm of two nodes on this machine, on loopback only, for as long as a command runs.
#
#   tests/slurm/cluster.sh COMMAND…     needs root; munge and slurm-wlm
#
# The command finds the cluster by SLURM_CONF. Nothing of it is left when the command has ended.
set -eu

folder=$(mktemp -d)
ports=${QUINTET_TEST_SLURM_PORT:-21817}

stop() {
    status=$?
    trap - EXIT INT TERM
    # The daemons know their numbers; jobs end with them.
    scancel --full --user=root 2>/dev/null || true
    for file in "$folder"/slurmctld.pid "$folder"/slurmd-n1.pid "$folder"/slurmd-n2.pid "$folder"/munge/pid; do
        if [ -s "$file" ]; then kill "$(cat "$file")" 2>/dev/null || true; fi
    done
    if [ "$status" != 0 ]; then
        for log in "$folder"/*.log; do echo "-- $(basename "$log")"; tail -n 15 "$log"; done >&2
    fi
    # A daemon may be about to write its last words.
    rm -rf "$folder" 2>/dev/null || { sleep 1; rm -rf "$folder"; }
    exit "$status"
}
trap stop EXIT
trap 'exit 130' INT TERM

chmod 755 "$folder"
mkdir -m 755 "$folder/state" "$folder/spool-n1" "$folder/spool-n2" "$folder/munge"
head -c 1024 /dev/urandom >"$folder/munge/key"
chmod 400 "$folder/munge/key"
cat >"$folder/slurm.conf" <<CONF
ClusterName=quintet
SlurmctldHost=localhost
SlurmctldAddr=127.0.0.1
SlurmctldPort=$ports
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=1,sched_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=30
MpiDefault=none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MailProg=/bin/true
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port=$((ports + 1)) CPUs=2
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port=$((ports + 2)) CPUs=2
PartitionName=low Nodes=n1,n2 Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=n1,n2 PriorityTier=10 PreemptMode=OFF
CONF
export SLURM_CONF="$folder/slurm.conf"
munged --force --key-file="$folder/munge/key" --socket="$folder/munge/socket" --pid-file="$folder/munge/pid" \
    --log-file="$folder/munge.log" --seed-file="$folder/munge/seed"
slurmctld -i
slurmd -N n1
slurmd -N n2
"$@"
