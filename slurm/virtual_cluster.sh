#!/usr/bin/env bash
# A real SLURM on one machine: N virtual nodes, each a slurmd of its own, so that sbatch, srun, requeue and
# the SLURM_* variables can be tried without a cluster.
#
#   bash slurm/virtual_cluster.sh up [--nodes 20] [--gpus-per-node 4] [--dir DIR] [--install]
#   bash slurm/virtual_cluster.sh status [--dir DIR]
#   bash slurm/virtual_cluster.sh down [--dir DIR]
#
# `up` prints, as its last line, `export SLURM_CONF=...`; so: eval "$(bash slurm/virtual_cluster.sh up | tail -1)".
# Needs root: slurmd starts tasks as other users, and each node's name goes into /etc/hosts (a marked block),
# because rank 0 is found by the name of its node. `--install` lets it install slurm-wlm and munge with apt-get.
# An existing SLURM is left alone: everything lives in DIR, munge's key and socket and the GPUs' device files too.
# GPUs are pretended (gres and CUDA_VISIBLE_DEVICES are real, the devices are not): run with cluster.platform=cpu.
# Costs 6 MB a node, and about a second to start 20 of them (measured).
set -euo pipefail

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; }
die() { echo "virtual_cluster.sh: $*" >&2; exit 1; }
say() { echo "virtual_cluster.sh: $*" >&2; }

command=${1:-}
[[ $# -gt 0 ]] && shift
nodes=20 gpus=4 dir=/tmp/dpdist-virtual-cluster install=false
while [[ $# -gt 0 ]]; do
    case $1 in
        --install) install=true; shift; continue ;;
        --nodes | --gpus-per-node | --dir) [[ $# -ge 2 ]] || die "$1 needs a value" ;;
        *) usage >&2; die "unknown option $1" ;;
    esac
    case $1 in
        --nodes) nodes=$2 ;;
        --gpus-per-node) gpus=$2 ;;
        --dir) dir=$2 ;;
    esac
    shift 2
done
[[ $nodes =~ ^[1-9][0-9]{0,2}$ ]] || die "--nodes = $nodes: give a number from 1 to 999"
[[ $gpus =~ ^[0-9]{1,2}$ ]] || die "--gpus-per-node = $gpus: give a number from 0 to 99"
[[ $dir =~ ^/[A-Za-z0-9._/-]+$ ]] || die "--dir = $dir: give an absolute path without spaces (slurm.conf has no quotes)"

marker="$dir/.dpdist-virtual-cluster"   # Holds the shape; only a directory that has it is ever removed.
begin="# >>> dpdist virtual cluster $dir"
end="# <<< dpdist virtual cluster $dir"
export SLURM_CONF="$dir/slurm.conf"

node_names() { for ((i = 1; i <= nodes; i++)); do printf "n%0${#nodes}d\n" "$i"; done; }

# A pid file may be older than a reboot: a pid counts only while its process names our directory.
# Nor does a zombie (where nobody reaps orphans, as in some containers): it has no command line.
is_ours() { { tr '\0' ' ' <"/proc/$1/cmdline"; } 2>/dev/null | grep -qF "$dir/"; }

running_pid() {
    local pid
    pid=$(cat "$1" 2>/dev/null) && [[ $pid =~ ^[0-9]+$ ]] && is_ours "$pid" && echo "$pid"
}

# Not sed -i: in a container /etc/hosts is a mount that can be written but not replaced.
write_hosts() {
    local others
    others=$(awk -v begin="$begin" -v end="$end" '$0 == begin {skip = 1} !skip; $0 == end {skip = 0}' /etc/hosts)
    { echo "$others"; [[ $# -eq 0 ]] || { echo "$begin"; printf '127.0.0.1 %s\n' "$@"; echo "$end"; }; } >/etc/hosts
}

# The slurmstepd of every running step of this cluster; its tasks are its children. slurmd leaves no pid file
# for them, but they write into our log directory.
step_daemons() {
    local pid
    for pid in $(pgrep slurmstepd); do
        ! readlink "/proc/$pid/fd/"* 2>/dev/null | grep -qF "$dir/log/" || echo "$pid"
    done
}

check_requirements() {
    [[ $(id -u) -eq 0 ]] || die "must be root: slurmd starts tasks as other users, and node names go into /etc/hosts"
    local missing=() program
    for program in slurmctld slurmd munged sinfo pgrep; do
        command -v "$program" >/dev/null || missing+=("$program")
    done
    [[ ${#missing[@]} -gt 0 ]] || return 0
    $install || die "not installed: ${missing[*]}; run again with --install, or: apt-get install slurm-wlm munge procps"
    command -v apt-get >/dev/null || die "--install needs apt-get; install slurm-wlm, munge and procps by hand"
    say "installing slurm-wlm, munge and procps"
    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends slurm-wlm munge procps; } \
        >/dev/null || die "apt-get could not install slurm-wlm, munge and procps"
}

# Ports for this cluster alone, so that several can run beside each other and beside a real one: the
# controller's, then one a node. All below 20000, where the coordinators of training jobs begin.
first_free_port() {
    local base port
    for ((base = 10000; base + nodes < 20000; base += nodes + 1)); do
        for ((port = base; port <= base + nodes; port++)); do
            (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null && continue 2
        done
        echo "$base"
        return
    done
    die "no $nodes free ports in a row below 20000"
}

write_configuration() {
    local base=$1 host width=${#nodes} first last
    host=$(hostname -s)
    printf -v first "%0${width}d" 1
    printf -v last "%0${width}d" "$nodes"
    local gres="" gres_types=""
    if [[ $gpus -gt 0 ]]; then
        gres=" Gres=gpu:v100:$gpus"
        gres_types="GresTypes=gpu"
        # slurmd wants device files that exist; links, because mknod is not allowed in every container.
        for ((i = 0; i < gpus; i++)); do ln -s /dev/null "$dir/gpu$i"; done
        echo "Name=gpu Type=v100 File=$dir/gpu[0-$((gpus - 1))]" >"$dir/gres.conf"
        [[ $gpus -gt 1 ]] || echo "Name=gpu Type=v100 File=$dir/gpu0" >"$dir/gres.conf"
    fi
    cat >"$SLURM_CONF" <<CONF
ClusterName=dpdist
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$base
# Job numbers of its own as well: the port of a training job's coordinator follows from them.
FirstJobId=$base
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge.socket
StateSaveLocation=$dir/state
SlurmctldPidFile=$dir/slurmctld.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdPidFile=$dir/%n.pid
SlurmdLogFile=$dir/log/%n.log
SlurmdSpoolDir=$dir/spool/%n
# Virtual nodes claim more cores and memory than the machine has.
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
# 80 tasks that import JAX on two cores keep slurmd waiting.
MessageTimeout=60
SlurmdTimeout=300
$gres_types
NodeName=n[$first-$last] NodeHostname=$host NodeAddr=127.0.0.1 Port=[$((base + 1))-$((base + nodes))] CPUs=64 RealMemory=500000$gres
PartitionName=virtual Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
    [[ $nodes -gt 1 ]] || sed -i "s/n\[1-1\]/n1/; s/Port=\[\([0-9]*\)-[0-9]*\]/Port=\1/" "$SLURM_CONF"
}

start_daemons() {
    local name
    running_pid "$dir/munged.pid" >/dev/null || munged --force --socket="$dir/munge.socket" --key-file="$dir/munge.key" \
        --pid-file="$dir/munged.pid" --log-file="$dir/log/munged.log" --seed-file="$dir/munge.seed"
    running_pid "$dir/slurmctld.pid" >/dev/null || slurmctld -f "$SLURM_CONF"
    for name in $(node_names); do
        running_pid "$dir/$name.pid" >/dev/null || slurmd -f "$SLURM_CONF" -N "$name"
    done
}

idle_nodes() { sinfo --noheader --Node --format=%T 2>/dev/null | grep -cE '^(idle|mixed|allocated)$' || true; }

up() {
    check_requirements
    local shape="$nodes $gpus" found
    if [[ -e $marker ]]; then
        found=$(cat "$marker")
        [[ $found == "$shape" ]] || die "$dir holds a cluster of ${found/ / nodes with } GPUs each; take it down first"
    else
        [[ ! -e $dir || -z $(ls -A "$dir") ]] || die "$dir is not empty and not a virtual cluster; choose another --dir"
        mkdir -p "$dir"
        chmod 755 "$dir"
        mkdir "$dir/state" "$dir/log" "$dir/spool"
        echo "$shape" >"$marker"
        (umask 077 && head -c 128 /dev/urandom >"$dir/munge.key")
        write_configuration "$(first_free_port)"
    fi
    # shellcheck disable=SC2046  # One word a name is meant.
    write_hosts $(node_names)
    start_daemons
    for ((i = 0; i < 300; i++)); do
        if [[ $(idle_nodes) -eq $nodes ]]; then
            say "$nodes nodes with $gpus GPUs each are up"
            echo "export SLURM_CONF=$SLURM_CONF"
            return
        fi
        sleep 0.2
    done
    tail -n 5 "$dir"/log/*.log >&2
    die "$(idle_nodes) of $nodes nodes came up within 60 s; the last lines of the logs are above"
}

down() {
    [[ -e $marker ]] || { say "no virtual cluster in $dir"; return; }
    [[ $(id -u) -eq 0 ]] || die "must be root"
    read -r nodes gpus <"$marker"
    if running_pid "$dir/slurmctld.pid" >/dev/null; then
        squeue --noheader --format=%A | xargs --no-run-if-empty scancel --quiet || true
    fi
    # Tasks would outlive slurmd, and scancel gives those that ignore TERM, as JAX does, another 30 s.
    for ((i = 0; i < 20; i++)); do
        [[ -n $(step_daemons) ]] || break
        step_daemons | xargs -I{} pgrep -P {} | xargs --no-run-if-empty kill -KILL 2>/dev/null || true
        sleep 0.1
    done
    step_daemons | xargs --no-run-if-empty kill -KILL 2>/dev/null || true
    local file pid pids=()
    for file in "$dir"/*.pid; do
        pid=$(running_pid "$file") && pids+=("$pid")
    done
    [[ ${#pids[@]} -eq 0 ]] || kill "${pids[@]}" 2>/dev/null || true
    for ((i = 0; i < 20; i++)); do
        # Not by the pid files again: a daemon removes its own before it ends.
        local left=()
        for pid in "${pids[@]}"; do ! is_ours "$pid" || left+=("$pid"); done
        [[ ${#left[@]} -gt 0 ]] || break
        sleep 0.1
    done
    [[ ${#left[@]} -eq 0 ]] || kill -KILL "${left[@]}" 2>/dev/null || true
    write_hosts
    rm -rf "$dir"
    say "stopped ${#pids[@]} daemons and removed $dir; in a shell that has used it: unset SLURM_CONF"
}

status() {
    [[ -e $marker ]] || die "no virtual cluster in $dir"
    read -r nodes gpus <"$marker"
    sinfo || die "the controller does not answer; see $dir/log"
    [[ $(idle_nodes) -eq $nodes ]] || die "$(idle_nodes) of $nodes nodes are up; see $dir/log"
    echo "export SLURM_CONF=$SLURM_CONF"
}

case $command in
    up | down | status) "$command" ;;
    -h | --help) usage ;;
    *) usage >&2; die "give up, down or status" ;;
esac
