#!/usr/bin/env bash
# A real Slurm cluster on one machine, for tests: munge, a controller, and several nodes, without systemd or accounting.
#   cluster.sh start DIR [NODES]    up in about a second; then: export SLURM_CONF=DIR/slurm.conf
#   cluster.sh stop DIR             ends all processes and deletes the records of all jobs
#   cluster.sh kill-node DIR K      power failure of node K: kills all of its processes
#   cluster.sh kill-daemon DIR K    kills only the slurmd of node K
#   cluster.sh start-node DIR K     starts node K, or its slurmd
# Needs root and the Debian packages slurm-wlm and munge. Each node is a slurmd in namespaces of its own: a host name, a
# /proc, a /dev/shm, and an /etc/hosts with the other nodes. Jobs affect each other as on as many machines that share a
# file system.
# Environment: CPUS=4 per node, MEMORY_MIB=8000 per node, GRACE_SECONDS=15 for a pre-empted job to save, PORT=17800 is
# the first of NODES + 1 ports, FIRST_JOB_ID=1 (a new cluster assigns the same ids again).
set -euo pipefail

PATH=$PATH:/usr/sbin
command=${1:?start, stop, kill-node, kill-daemon or start-node}
folder=$(realpath -m "${2:?the folder of the cluster}")
export SLURM_CONF=$folder/slurm.conf
port=${PORT:-17800}

fail() { echo "cluster.sh: $*" >&2; exit 1; }
is_alive() { [ -s "$1" ] && grep -qs '^State:.[^Z]' "/proc/$(cat "$1")/status"; }
is_dead() { ! is_alive "$1"; }
wait_for() { # SECONDS COMMAND...
    local end=$((${EPOCHREALTIME/./} + $1 * 1000000)); shift
    until "$@" >"$folder/log/wait" 2>&1; do
        [ "${EPOCHREALTIME/./}" -lt "$end" ] || return 1
        sleep 0.05
    done
}
end_process() { # PID-FILE SIGNAL
    if is_alive "$1"; then
        kill "-$2" "$(cat "$1")" 2>/dev/null || true
        wait_for 5 is_dead "$1" || kill -KILL "$(cat "$1")" 2>/dev/null || true
    fi
    rm -f "$1"
}

configure() { # NODES
    local number host
    host=$(hostname -s)
    mkdir -p "$folder"/{run,log,state,munge}
    chmod 755 "$folder" && chmod 711 "$folder/munge"
    echo "$1" >"$folder/nodes"
    echo "127.0.0.1 localhost $host" >"$folder/hosts"
    for number in $(seq "$1"); do
        mkdir -p "$folder/spool/node$number"
        echo "127.0.0.$((10 + number)) node$number" >>"$folder/hosts"
    done
    [ -f "$folder/munge/key" ] || (umask 077 && head -c 128 /dev/urandom >"$folder/munge/key")
    # Two files in the place of GPUs are enough: Slurm allocates their numbers like those of GPUs.
    echo 'Name=gpu File=/dev/tty[0-1]' >"$folder/gres.conf"
    cat >"$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# Slurm starts a requeued job only after its old credential has expired: 120 s by default.
AuthInfo=socket=$folder/munge/socket,cred_expire=5
CredType=cred/munge
SlurmctldPidFile=$folder/run/slurmctld.pid
SlurmctldLogFile=$folder/log/slurmctld.log
StateSaveLocation=$folder/state
SlurmdPidFile=$folder/run/slurmd-%n.pid
SlurmdLogFile=$folder/log/slurmd-%n.log
SlurmdSpoolDir=$folder/spool/%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
FirstJobId=${FIRST_JOB_ID:-1}
MinJobAge=3600
# A slurmd answers only after the processes that it must end have ended, after KillWait at the latest. Slurm repeats a
# request without an answer after a minute, and would then end the step of the same number of the requeued job.
MessageTimeout=15
KillWait=5
SlurmdTimeout=10
# 2: a node that was killed is used again as soon as its slurmd runs
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
GresTypes=gpu
NodeName=node[1-$1] NodeHostname=$host NodeAddr=127.0.0.[11-$((10 + $1))] Port=[$((port + 1))-$((port + $1))] CPUs=${CPUS:-4} Boards=1 SocketsPerBoard=1 CoresPerSocket=${CPUS:-4} ThreadsPerCore=1 RealMemory=${MEMORY_MIB:-8000} Gres=gpu:2 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=${GRACE_SECONDS:-15}
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
CONF
}

start_node() { # K
    local name=node$1 first=$folder/run/node$1.pid
    if is_alive "$first"; then # the node is up; its daemon may have been killed
        local inside
        inside=$(pgrep -P "$(cat "$first")")
        nsenter -t "$inside" -a pgrep -x slurmd >/dev/null ||
            nsenter -t "$inside" -a setsid slurmd -N "$name" </dev/null >>"$folder/log/$name.out" 2>&1
        return
    fi
    rm -f "$folder/run/slurmd-$name.pid"
    # The first process of the namespace only collects ended children, so that slurmd can be killed without the node.
    setsid unshare --uts --pid --mount --mount-proc --fork --kill-child bash -c "
        hostname $name
        mount --bind '$folder/hosts' /etc/hosts
        mount -t tmpfs -o size=1g tmpfs /dev/shm
        slurmd -D -N $name &
        while :; do wait; sleep 0.5; done" </dev/null >>"$folder/log/$name.out" 2>&1 &
    echo $! >"$first"
}

all_idle() { [ "$(sinfo -h -N -p low -o %T | grep -cx idle)" = "$(cat "$folder/nodes")" ]; }

case $command in
start)
    for program in munged slurmctld slurmd srun nsenter; do
        [ -n "$(type -P $program)" ] || fail "$program is missing: apt-get install slurm-wlm munge util-linux"
    done
    unshare --uts --pid --mount --mount-proc --fork true || fail "this machine permits no namespaces (unshare)"
    configure "${3:-4}"
    # Forced, because the folder of a test may be closed to other users; all files here belong to root.
    is_alive "$folder/run/munged.pid" || munged --force --key-file="$folder/munge/key" --socket="$folder/munge/socket" \
        --pid-file="$folder/run/munged.pid" --log-file="$folder/munge/log" --seed-file="$folder/munge/seed"
    wait_for 10 test -S "$folder/munge/socket" || fail "munged does not answer: $folder/munge/log"
    is_alive "$folder/run/slurmctld.pid" || slurmctld
    wait_for 15 scontrol ping || fail "slurmctld does not answer: $folder/log/slurmctld.log"
    for number in $(seq "$(cat "$folder/nodes")"); do start_node "$number"; done
    wait_for 30 all_idle || fail "not all nodes came up: $folder/log"
    ;;
stop)
    [ -f "$SLURM_CONF" ] || exit 0
    end_process "$folder/run/slurmctld.pid" KILL
    # `unshare --kill-child` kills all processes in the process namespace of the node.
    for first in "$folder"/run/node*.pid; do end_process "$first" KILL; done
    end_process "$folder/run/munged.pid" TERM
    rm -rf "${folder:?}"/{run,state,spool}
    ;;
kill-node) end_process "$folder/run/node${3:?which node}.pid" KILL ;;
kill-daemon)
    # Its job steps are processes of their own (slurmstepd) and continue.
    inside=$(pgrep -P "$(cat "$folder/run/node${3:?which node}.pid")")
    nsenter -t "$inside" -a pkill -KILL -x slurmd
    ;;
start-node) start_node "${3:?which node}" ;;
*) fail "start, stop, kill-node, kill-daemon or start-node, not '$command'" ;;
esac
