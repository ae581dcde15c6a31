#!/bin/sh
# Runs of two nodes by `quintet launch slurm`: undisturbed, requeued, preempted, in an allocation, under srun. Each must
# end with the weights of a run on one machine, bit for bit.
#
#   tests/slurm/cluster.sh tests/slurm/cases.sh QUINTET     where QUINTET is the program
set -eu

quintet=$(realpath "$1")
cases=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp "$cases/job.toml" "$work"
cd "$work"

fail() {
    echo "slurm: $1" >&2
    shift
    for file in "$@"; do echo "-- $file"; cat "$file"; done >&2
    squeue >&2 || true
    exit 1
}

# Waits up to 90 s until a command succeeds.
wait_until() {
    what=$1
    shift
    tries=0
    until "$@"; do
        tries=$((tries + 1))
        [ "$tries" -lt 450 ] || fail "waited in vain until $what" runs/*/slurm-*.log
        sleep 0.2
    done
}

ready() { [ "$(sinfo --noheader --format=%t --nodes=n1,n2 | sort -u)" = idle ]; }
committed() { [ "$(cat "runs/$1/ledger.jsonl" 2>/dev/null | wc -l)" -ge "$2" ]; }
over() { ! squeue --noheader --jobs "$1" 2>/dev/null | grep -q .; }
is_pending() { [ "$(squeue --noheader --format=%T --jobs "$1" 2>/dev/null)" = PENDING ]; }

# Slurm lets a job that was put back wait for two minutes. Two seconds are needed: credentials of the life before are
# revoked by the second.
start_again() {
    wait_until "job $1 is back in the queue" is_pending "$1"
    scontrol update "JobId=$1" StartTime=now+2
}

# The run is complete, by two workers, with the weights of the run on one machine; job $2 succeeded.
check() {
    cmp -s runs/local/model/model.safetensors "runs/$1/model/model.safetensors" ||
        fail "$1: other weights than on one machine" "runs/$1"/slurm-*.log
    steps=$(wc -l <"runs/$1/ledger.jsonl")
    [ "$steps" = "$(wc -l <runs/local/ledger.jsonl)" ] || fail "$1: $steps steps are committed"
    [ -z "$(find "runs/$1" -name '.join*')" ] || fail "$1: tokens were left behind"
    if [ $# -gt 1 ]; then
        scontrol show job "$2" | grep -q 'JobState=COMPLETED' || fail "$1: the job failed" "runs/$1"/slurm-*.log
        restarts=$(scontrol show job "$2" | sed -n 's/.* Restarts=\([0-9]*\).*/\1/p')
        [ "$restarts" = "$3" ] || fail "$1: $restarts restarts"
        [ "$3" = 0 ] || grep -q "resuming after step" "runs/$1"/slurm-*.log || fail "$1: began anew" "runs/$1"/slurm-*.log
        grep -q "2 of 2 workers joined" "runs/$1"/slurm-*.log || fail "$1: not by two workers" "runs/$1"/slurm-*.log
    fi
    echo "$1: the weights of a run on one machine"
}

submit() {
    name=$1
    shift
    "$quintet" launch slurm job.toml --nodes 2 --output "runs/$name" "$@"
}

wait_until "both nodes are idle" ready
"$quintet" train job.toml --output runs/local 2>local.log || fail "the run on one machine" local.log

# Not on 127.0.0.1, it is encrypted, as between machines.
job=$(submit undisturbed --listen 127.0.0.2:0)
wait_until "job $job is over" over "$job"
check undisturbed "$job" 0
[ -f runs/undisturbed/security/authority.key ] || fail "undisturbed: not encrypted"

job=$(submit requeued)
wait_until "some steps are committed" committed requeued 30
scontrol requeue "$job"
start_again "$job"
wait_until "job $job is over" over "$job"
check requeued "$job" 1

job=$(submit warned)
wait_until "some steps are committed" committed warned 30
scancel --signal=USR1 --batch "$job"
start_again "$job"
wait_until "job $job is over" over "$job"
check warned "$job" 1

job=$(submit preempted)
wait_until "some steps are committed" committed preempted 30
urgent=$(sbatch --parsable --partition=high --nodes=2 --exclusive --output=/dev/null --wrap=true)
wait_until "the urgent job is over" over "$urgent"
start_again "$job"
wait_until "job $job is over" over "$job"
check preempted "$job" 1

# Inside an allocation, without flags: this shell is the coordinator's.
salloc --quiet --nodes=2 --ntasks-per-node=1 "$quintet" launch slurm job.toml --output runs/allocated 2>allocated.log ||
    fail "in an allocation" allocated.log
grep -q "2 of 2 workers joined" allocated.log || fail "allocated: not by two workers" allocated.log
check allocated

# The doctor finds the hosts of the allocation.
salloc --quiet --nodes=2 "$quintet" doctor --cluster job.toml >doctor.log 2>&1 || fail "the doctor" doctor.log
grep -q "^ok     n1 -> n2 " doctor.log || fail "the doctor: no link" doctor.log
tail -n 1 doctor.log

# Under srun, without flags: the tasks find each other.
srun --quiet --nodes=2 --ntasks=2 --input=none "$quintet" launch slurm job.toml --output runs/tasks 2>tasks.log ||
    fail "under srun" tasks.log
grep -q "2 of 2 workers joined" tasks.log || fail "tasks: not by two workers" tasks.log
check tasks
