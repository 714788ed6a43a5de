#!/bin/bash
# A real Slurm of two nodes on this one machine, for the tests: its own folder, ports, key and daemons.
#
#     slurm/test_cluster.sh start     # installs slurm-wlm and munge with apt where they are missing; needs root
#     eval "$(slurm/test_cluster.sh env)"; sinfo
#     slurm/test_cluster.sh stop
#
# LLAMITA_CLUSTER names the folder (default /tmp/llamita-cluster). Nothing outside it is changed, and only what `start`
# started is stopped. Exit code 69: Slurm can neither be found nor installed here.
set -euo pipefail

folder=${LLAMITA_CLUSTER:-/tmp/llamita-cluster}
export PATH="$PATH:/usr/sbin:/sbin"
export SLURM_CONF="$folder/slurm.conf"

fail() { echo "test_cluster: $*" >&2; exit 1; }
unavailable() { echo "test_cluster: $*" >&2; exit 69; }

install_slurm() {
    command -v slurmctld > /dev/null && command -v slurmd > /dev/null && command -v munged > /dev/null && return
    command -v apt-get > /dev/null || unavailable "there is no Slurm, and no apt-get that could install it"
    echo "installing slurm-wlm and munge" >&2
    # Nothing of the distribution's own cluster may start by itself: policy-rc.d is how Debian is told.
    local policy=/usr/sbin/policy-rc.d made=no
    [ -e "$policy" ] || { printf '#!/bin/sh\nexit 101\n' > "$policy"; chmod 755 "$policy"; made=yes; }
    local code=0
    {
        apt-get update -qq &&
            DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends slurm-wlm munge
    } >&2 || code=$?
    [ "$made" = yes ] && rm -f "$policy"
    [ "$code" -eq 0 ] || unavailable "apt-get could not install slurm-wlm and munge"
}

# Four ports in a row that nobody here listens on, outside those that Linux gives away by itself.
free_ports() {
    local first
    for first in $(seq 17000 10 19000); do
        local taken=no port
        for port in 0 1 2 3; do (: < "/dev/tcp/127.0.0.1/$((first + port))") 2> /dev/null && taken=yes; done
        [ "$taken" = no ] && { echo "$first"; return; }
    done
    fail "no ports are free"
}

configure() {
    local port host
    port=$(free_ports)
    host=$(hostname)
    mkdir -p "$folder"/{munge,state,n1,n2,log}
    chmod 755 "$folder" "$folder/munge"
    dd if=/dev/urandom of="$folder/munge/key" bs=128 count=1 status=none
    chmod 400 "$folder/munge/key"
    # A requeued job waits until its credential has expired, hence cred_expire, which is two minutes by default.
    # The nodes' memory and processors are invented (config_overrides): a stage on each, whatever the machine has.
    cat > "$SLURM_CONF" << END
ClusterName=llamita
SlurmctldHost=$host(127.0.0.1)
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket,cred_expire=5
CredType=cred/munge
SlurmctldPort=$port
SlurmctldPidFile=$folder/slurmctld.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmctldTimeout=60
SlurmdPidFile=$folder/%n/slurmd.pid
SlurmdLogFile=$folder/log/%n.log
SlurmdSpoolDir=$folder/%n
SlurmdTimeout=120
SlurmdParameters=config_overrides
StateSaveLocation=$folder/state
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=5,bf_interval=5,batch_sched_delay=0
MpiDefault=none
SwitchType=switch/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
JobRequeue=1
KillWait=${LLAMITA_CLUSTER_KILL_WAIT:-30}
KillOnBadExit=1
MinJobAge=600
InactiveLimit=0
OverTimeLimit=0
ReturnToService=2
FirstJobId=$(((port - 17000) * 10 + 101))
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 1)) CPUs=4 RealMemory=16000 State=UNKNOWN
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 2)) CPUs=4 RealMemory=16000 State=UNKNOWN
PartitionName=test Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
END
}

ours() { grep -qs '^ClusterName=llamita$' "$SLURM_CONF"; }

# Whether the daemon of that name and pid file lives; the number alone may be another process's by now.
running() { [ -s "$1" ] && [ "$(cat "/proc/$(cat "$1")/comm" 2> /dev/null)" = "$2" ]; }

start() {
    [ "$(id -u)" -eq 0 ] || unavailable "only root can start a cluster that runs jobs"
    if ours; then
        running "$folder/slurmctld.pid" slurmctld && { echo "already running in $folder" >&2; usage; return; }
        stop
    fi
    [ -z "$(ls -A "$folder" 2> /dev/null)" ] || fail "$folder holds something else"
    install_slurm
    configure
    munged --force --key-file="$folder/munge/key" --socket="$folder/munge/socket" --pid-file="$folder/munge/pid" \
        --log-file="$folder/munge/log" --seed-file="$folder/munge/seed"
    slurmctld -c
    slurmd -N n1
    slurmd -N n2
    local second
    for second in $(seq 60); do
        [ "$(sinfo --noheader --Node --format='%t' 2> /dev/null | grep -c '^idle$')" = 2 ] && { usage; return; }
        sleep 1
    done
    tail -n 20 "$folder"/log/*.log >&2
    stop
    fail "the nodes did not come up within $second seconds"
}

usage() {
    echo "export SLURM_CONF=$SLURM_CONF"
}

stop() {
    ours || { echo "there is no cluster in $folder" >&2; return; }
    if running "$folder/slurmctld.pid" slurmctld; then
        timeout 20 scancel --quiet --state=PENDING 2> /dev/null || true
        timeout 20 scancel --quiet --signal=KILL --state=RUNNING 2> /dev/null || true
        for _ in $(seq 20); do [ -z "$(timeout 5 squeue --noheader 2> /dev/null)" ] && break; sleep 0.5; done
    fi
    end_daemon "$folder/n1/slurmd.pid" slurmd
    end_daemon "$folder/n2/slurmd.pid" slurmd
    end_daemon "$folder/slurmctld.pid" slurmctld
    end_daemon "$folder/munge/pid" munged
    rm -rf "$folder"
}

end_daemon() {
    local pid
    running "$1" "$2" || return 0
    pid=$(cat "$1")
    kill "$pid" || true
    for _ in $(seq 100); do kill -0 "$pid" 2> /dev/null || return 0; sleep 0.1; done
    kill -KILL "$pid" || true
}

case ${1:-} in
    start) start ;;
    stop) stop ;;
    env) ours || fail "no cluster in $folder: start it first"; usage ;;
    *) fail "say start, stop or env" ;;
esac
