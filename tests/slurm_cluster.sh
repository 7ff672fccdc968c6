#!/bin/bash
# A whole Slurm cluster of two nodes on this machine: `slurm_cluster.sh FOLDER`, in namespaces of its own
# (tests/slurm_cluster.py says which). It says "ready" and ends, with all that it started, when its input closes.
set -eu
cd "$1"
nodes=(alpha beta)
address=10.77.0.1

# Slurm resolves names only where some address is not the loopback's.
ip link set lo up
ip address add $address/24 dev lo
hostname login
printf '127.0.0.1 localhost\n%s login %s\n' $address "${nodes[*]}" > hosts
mount --bind hosts /etc/hosts

head -c 128 /dev/urandom > munge.key
chmod 600 munge.key
munged --force --foreground --key-file="$PWD/munge.key" --socket="$PWD/munge.socket" --seed-file="$PWD/munge.seed" \
    --pid-file="$PWD/munged.pid" --log-file="$PWD/munged.log" &

# cred_expire: so many seconds a requeued job waits. MaxTime is in minutes. Nodes have more CPUs than the machine, and
# GPUs that are only counted, so that several jobs run at once and options are checked as on a real cluster.
cat > slurm.conf << END
ClusterName=test
SlurmctldHost=login($address)
SlurmUser=root
AuthInfo=socket=$PWD/munge.socket,cred_expire=5
StateSaveLocation=$PWD/state
SlurmdSpoolDir=$PWD/spool-%n
SlurmctldPidFile=$PWD/slurmctld.pid
SlurmdPidFile=$PWD/slurmd-%n.pid
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=20
SlurmdTimeout=10
ReturnToService=2
GresTypes=gpu
NodeName=${nodes[0]} NodeAddr=$address Port=6821 CPUs=4 RealMemory=8000 Gres=gpu:2
NodeName=${nodes[1]} NodeAddr=$address Port=6822 CPUs=4 RealMemory=8000 Gres=gpu:2
PartitionName=main Nodes=ALL Default=YES MaxTime=60 DefaultTime=10 GraceTime=20
PartitionName=urgent Nodes=ALL MaxTime=60 PriorityTier=10 PreemptMode=OFF
PartitionName=single Nodes=${nodes[0]} MaxTime=5 AllowAccounts=lab
END
touch gpu0 gpu1
echo "Name=gpu File=$PWD/gpu[0-1]" > gres.conf

export SLURM_CONF="$PWD/slurm.conf"
mkdir state
until [ -S munge.socket ]; do sleep 0.05; done
slurmctld -D > slurmctld.log 2>&1 &
for node in "${nodes[@]}"; do
    mkdir "spool-$node"
    # A name and shared memory of its own, as another machine would have.
    unshare --uts --mount sh -c "hostname $node; mount -t tmpfs tmpfs /dev/shm; exec slurmd -D -N $node" \
        > "slurmd-$node.log" 2>&1 &
done
until [ "$(sinfo --noheader --partition=main --states=idle --format=%D 2> /dev/null)" = "${#nodes[@]}" ]; do
    sleep 0.1
done
echo ready
read -r _ || true
