#!/bin/bash
# Run a real two-node Slurm cluster on this machine, for tests: cluster.sh up | down | kill-node NAME | start-node NAME
#
# Each node is a slurmd in its own network, host name, mount and process namespaces, with its own address, /etc/hosts
# and /dev/shm. Killing the first process of a namespace simulates a power failure. Nodes declare 8 CPUs and 2 GPUs
# (links to /dev/null), whatever the machine has. Requires root and, to install packages, apt. Exit status 3: this
# machine cannot run a cluster; the message gives the reason.
set -euo pipefail
LAB=${CLUSTER:-/tmp/solar-train-cluster}
NET=10.77.0 BRIDGE=solarbr0 NODES="node1 node2"
export SLURM_CONF=$LAB/etc/slurm.conf PATH=$PATH:/usr/sbin:/sbin

cannot() { echo "no cluster: $*" >&2; exit 3; }

installed() {
  for program; do command -v "$program" >/dev/null || return 1; done
}

install_packages() {
  [ "$(id -u)" = 0 ] || cannot "root is required"
  if ! installed slurmctld slurmd munged sbatch ip unshare || ! compgen -G "/usr/lib/*/libpmix.so" >/dev/null; then
    command -v apt-get >/dev/null || cannot "Slurm is not installed and there is no apt-get"
    { apt-get update -qq && RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
      slurmctld slurmd slurm-client munge libpmix-dev iproute2 util-linux; } >"$LAB/apt.log" 2>&1 ||
      cannot "apt-get failed: $(tail -n 1 "$LAB/apt.log")"
  fi
  unshare --net --uts --mount --pid --fork --mount-proc sh -c 'hostname x && ip link add name b0 type bridge' \
    2>/dev/null || cannot "namespaces are not allowed here"
}

write_configuration() {
  # Cgroups are not used, but slurmd loads a plugin anyway, and the one for v2 requires systemd.
  echo "CgroupPlugin=cgroup/v1" >"$LAB/etc/cgroup.conf"
  echo "NodeName=node[1-2] Name=gpu Flags=nvidia_gpu_env File=$LAB/gpu[0-1]" >"$LAB/etc/gres.conf"
  for gpu in 0 1; do ln -s /dev/null "$LAB/gpu$gpu"; done
  printf '%s\n' "127.0.0.1 localhost" "$NET.1 $(hostname -s)" "$NET.11 node1" "$NET.12 node2" >"$LAB/etc/hosts"
  cat >"$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=$(hostname -s)($NET.1)
SlurmctldPort=16817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$LAB/munge/socket
TmpFS=$LAB/local
StateSaveLocation=$LAB/state
SlurmdSpoolDir=$LAB/spool/%n
SlurmctldPidFile=$LAB/slurmctld.pid
SlurmdPidFile=$LAB/slurmd-%n.pid
SlurmctldLogFile=$LAB/log/slurmctld.log
SlurmdLogFile=$LAB/log/slurmd-%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0,bf_min_age_reserve=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=0
KillWait=20
MinJobAge=86400
SlurmdTimeout=20
ReturnToService=2
SlurmdParameters=config_overrides
NodeName=node1 NodeAddr=$NET.11 NodeHostname=node1 Port=17000 CPUs=8 RealMemory=64000 Gres=gpu:2
NodeName=node2 NodeAddr=$NET.12 NodeHostname=node2 Port=17000 CPUs=8 RealMemory=64000 Gres=gpu:2
PartitionName=main Nodes=ALL Default=YES DefaultTime=10 State=UP PriorityTier=1 GraceTime=20
PartitionName=high Nodes=ALL DefaultTime=10 State=UP PriorityTier=10 PreemptMode=OFF
CONF
}

start() { # NAME COMMAND: run detached and record the process id
  local name=$1
  shift
  setsid "$@" </dev/null >"$LAB/log/$name.out" 2>&1 &
  echo $! >"$LAB/$name.launched"
}

start_node() {
  mkdir -p "$LAB/spool/$1"
  # shellcheck disable=SC2016  # expanded inside the namespace
  start "$1" nsenter --net="/run/netns/solar-$1" \
    unshare --uts --mount --pid --fork --mount-proc --kill-child=KILL --propagation private \
    bash -c 'hostname "$1"; mount --bind "$2/etc/hosts" /etc/hosts
             mount -t tmpfs -o mode=1777 tmpfs /dev/shm; mount -t tmpfs -o mode=1777 tmpfs "$2/local"
             slurmd -D -N "$1" & while :; do wait; done' node "$1" "$LAB"
}

kill_launched() { # NAME: kill it at once; for a node, this is a power failure
  [ -e "$LAB/$1.launched" ] || return 0
  kill -KILL "$(cat "$LAB/$1.launched")" 2>/dev/null || true
  rm "$LAB/$1.launched"
}

up() {
  down
  mkdir -p "$LAB"/{etc,state,spool,log,local}
  install_packages
  install -d -o munge -g munge -m 755 "$LAB/munge"
  install -d -o munge -g munge -m 700 "$LAB/munge/key"
  (umask 077 && head -c 128 /dev/urandom >"$LAB/munge/key/key")
  chown munge:munge "$LAB/munge/key/key"
  write_configuration
  start munged setpriv --reuid=munge --regid=munge --clear-groups munged --foreground --num-threads=2 \
    --socket="$LAB/munge/socket" --key-file="$LAB/munge/key/key" --pid-file="$LAB/munge/key/pid" \
    --log-file="$LAB/munge/key/log" --seed-file="$LAB/munge/key/seed"
  until munge -S "$LAB/munge/socket" -n >/dev/null 2>&1; do kill -0 "$(cat "$LAB/munged.launched")" && sleep 0.1; done

  ip link add "$BRIDGE" type bridge
  ip addr add "$NET.1/24" dev "$BRIDGE"
  ip link set "$BRIDGE" up
  for node in $NODES; do
    ip netns add "solar-$node"
    ip link add "so-$node" type veth peer name eth0 netns "solar-$node"
    ip link set "so-$node" master "$BRIDGE" up
    ip -n "solar-$node" addr add "$NET.1${node#node}/24" dev eth0
    ip -n "solar-$node" link set eth0 up
    ip -n "solar-$node" link set lo up
  done
  start slurmctld slurmctld -D -i
  for node in $NODES; do start_node "$node"; done
  for _ in $(seq 150); do
    [ "$(sinfo -h -p main -t idle -o %D 2>/dev/null)" = 2 ] && return
    sleep 0.2
  done
  tail -n 20 "$LAB"/log/* >&2
  cannot "the nodes did not come up"
}

down() { # also removes the remains of an earlier cluster
  for name in $NODES slurmctld munged; do kill_launched "$name"; done
  for node in $NODES; do
    ip link del "so-$node" 2>/dev/null || true
    ip netns del "solar-$node" 2>/dev/null || true
  done
  ip link del "$BRIDGE" 2>/dev/null || true
  rm -rf "$LAB"
}

case ${1:-} in
  up) up ;;
  down) down ;;
  kill-node) kill_launched "$2" ;;
  start-node) start_node "$2" ;;
  *) sed -n 2p "$0" >&2 && exit 2 ;;
esac
