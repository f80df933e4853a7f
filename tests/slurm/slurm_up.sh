#!/bin/bash
# usage: slurm_up.sh FOLDER PORT
# A real Slurm on the loopback, as root and without systemd, with its state in FOLDER: a controller at PORT and two
# nodes, n1 and n2, at the ports after it, each with two GPUs that are character devices. Its partitions:
#   low     preempted by high: queued again, no grace          grace   the same, with five minutes of grace
#   cancel  preempted by high: cancelled                       high    preempts the others
#   gpu     the name in slurm/README.md; like low
# slurm.conf stands in FOLDER: export SLURM_CONF.
set -euo pipefail
folder=$1 port=$2
mkdir -p "$folder"/{munge,controller,spool,log,gpu}
chmod 755 "$folder" "$folder/log"
: > "$folder/pids"
trap '"$(dirname "$0")/slurm_down.sh" "$folder"' ERR
host=$(hostname -s)
conf=$folder/slurm.conf socket=$folder/munge/socket
start() { # NAME COMMAND...: runs it in the background and remembers its id
  local name=$1; shift
  setsid "$@" < /dev/null > "$folder/log/$name.out" 2>&1 &
  echo $! >> "$folder/pids"
}
until_true() { # COMMAND...: waits ten minutes for it
  for _ in $(seq 2000); do "$@" > /dev/null 2>&1 && return 0; sleep 0.3; done
  echo "gave up waiting for: $*" >&2
  tail -n 5 "$folder"/log/*.out >&2
  return 1
}
munge_answers() { munge -n -S "$socket" | unmunge -S "$socket"; }
nodes_are_idle() { [ "$(sinfo -h -N -o %T -p low | grep -c '^idle$')" = 2 ]; }

# munged wants a user of its own, and nothing writable for others above its files.
dd if=/dev/urandom of="$folder/munge/key" bs=1024 count=1 status=none
chown -R munge:munge "$folder/munge"
chmod 755 "$folder/munge"
chmod 400 "$folder/munge/key"
start munged setpriv --reuid munge --regid munge --clear-groups munged -F --force --key-file="$folder/munge/key" \
  --socket="$socket" --pid-file="$folder/munge/pid" --log-file="$folder/munge/log" --seed-file="$folder/munge/seed"
until_true munge_answers

# A count of GPUs alone, or regular files, drain the nodes: these are copies of /dev/null.
for n in 0 1; do mknod -m 666 "$folder/gpu/nvidia$n" c 1 3; done
echo "NodeName=n[1-2] Name=gpu File=$folder/gpu/nvidia[0-1]" > "$folder/gres.conf"
# KillWait and GraceTime are long, so that no test depends on how fast a save is; so are the timeouts. cred_expire is how
# long a start may take, and what a job that is queued again waits for.
cat > "$conf" <<C
ClusterName=tests
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$socket,cred_expire=15
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation=$folder/controller
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/controller/pid
SlurmdPidFile=$folder/spool/%n.pid
SlurmctldLogFile=$folder/log/controller.log
SlurmdLogFile=$folder/log/%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$folder/log/completed
MpiDefault=none
ReturnToService=1
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0,requeue_delay=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
GresTypes=gpu
KillWait=300
MinJobAge=3600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MessageTimeout=60
TCPTimeout=30
BatchStartTimeout=300
SlurmdTimeout=300
InactiveLimit=0
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 1)) CPUs=4 RealMemory=16000 Gres=gpu:2 State=UNKNOWN
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 2)) CPUs=4 RealMemory=16000 Gres=gpu:2 State=UNKNOWN
PartitionName=low    Nodes=ALL State=UP PriorityTier=1  PreemptMode=REQUEUE Default=YES
PartitionName=grace  Nodes=ALL State=UP PriorityTier=1  PreemptMode=REQUEUE GraceTime=300
PartitionName=cancel Nodes=ALL State=UP PriorityTier=1  PreemptMode=CANCEL
PartitionName=gpu    Nodes=ALL State=UP PriorityTier=1  PreemptMode=REQUEUE
PartitionName=high   Nodes=ALL State=UP PriorityTier=10 PreemptMode=OFF
C
export SLURM_CONF=$conf
start controller slurmctld -D -i -f "$conf"
for n in n1 n2; do
  mkdir -p "$folder/spool/$n"
  start "$n" slurmd -D -N "$n" -f "$conf"
done
until_true nodes_are_idle
