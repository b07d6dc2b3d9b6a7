# What dpdist's batch scripts share: the site's settings, the command to run, starting it again, and how a job ends.
# train_80gpu.sh and scaling.sh source it, `dpdist submit` writes it into the script that it submits. Bash, in a SLURM job.
# What is decided is decided in launch/slurm/verdict.py; here it is done.

# Files of the user's in the working directory, such as json.py, stand in for no module that a task imports.
export PYTHONSAFEPATH=1

# note: what happens meanwhile; say: how it ended, on the last line.
note() { echo "+ $*" >&2; }
say() { echo "dpdist job: $*" >&2; }
die() { say "$*"; exit 2; }

# source_site FILE: read it as a login shell would. Modules and site files are not written for `set -euo pipefail`.
source_site() {
    local site_file=$1 site_options site_status site_line=0 site_command="" site_said
    site_said=$(bash -n "$site_file" 2>&1) || die "${site_said%%$'\n'*}"
    site_options=$(set +o)
    [[ $- != *e* ]] || site_options+=$'\nset -e' # which a command substitution does not see
    trap 'die "$site_file line $site_line: $site_command: ended the shell; use return"' EXIT
    set +euo pipefail
    set -o functrace
    # The trap above has this function's own last command as BASH_COMMAND.
    trap '[[ ${BASH_SOURCE[0]} != "$site_file" || $BASH_COMMAND == ". "* ]] || { site_line=$LINENO site_command=$BASH_COMMAND; }' DEBUG
    # shellcheck disable=SC1090
    . "$site_file"
    site_status=$?
    trap - DEBUG EXIT
    set +o functrace
    eval "$site_options"
    [ "$site_status" = 0 ] \
        || die "$site_file line $site_line: $site_command: status $site_status; if that is no failure, end the file with: true"
}

# read_site REPOSITORY: the site's own file, DPDIST_SITE or slurm/site.sh. Sets dpdist_container, what to put in front of a
# command so that it runs in the site's container (nothing where there is none), dpdist_command, and job_python.
read_site() {
    local site=${DPDIST_SITE:-$1/slurm/site.sh}
    if [ -f "$site" ]; then source_site "$site"; fi
    [ -f "$site" ] || [ -z "${DPDIST_SITE:-}" ] \
        || die "DPDIST_SITE = $site: no such file; copy slurm/site.example.sh there, or unset DPDIST_SITE"
    dpdist_container=()
    dpdist_command=("${DPDIST:-$1/.venv/bin/dpdist}")
    if [ -n "${DPDIST_CONTAINER:-}" ]; then
        [ -e "$DPDIST_CONTAINER" ] || die "DPDIST_CONTAINER = $DPDIST_CONTAINER: no such file; build it as docker/README.md says"
        # shellcheck disable=SC2206  # Several words are meant.
        dpdist_container=(${DPDIST_CONTAINER_EXEC:-apptainer exec --nv} "$DPDIST_CONTAINER")
        command -v "${dpdist_container[0]}" >/dev/null \
            || die "${dpdist_container[0]}, which runs DPDIST_CONTAINER, is not on the PATH; load its module in $site"
        dpdist_command=("${dpdist_container[@]}" "${DPDIST:-dpdist}")
    elif ! command -v "${dpdist_command[0]}" >/dev/null; then
        [ -f "$site" ] || site="slurm/site.sh (copy slurm/site.example.sh)"
        die "no command ${dpdist_command[0]}; install it with launch/quickstart.sh, or name another as DPDIST in $site"
    fi
    job_repository=$1
}

# as_task COMMAND...: run it where the tasks run. A container may have other paths than this shell.
as_task() { if [ "${#dpdist_container[@]}" = 0 ]; then "$@"; else "${dpdist_container[@]}" "$@"; fi; }

# verdict ARGUMENT...: ask launch/slurm/verdict.py, in the container or with the first Python here that can.
verdict() {
    if [ "${#dpdist_container[@]}" != 0 ]; then
        as_task python -P -m dpdist_launch.slurm.verdict "$@"
        return
    fi
    PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}${job_repository:-} "$job_python" -m dpdist_launch.slurm.verdict "$@"
}

# find_python: which Python answers `verdict`: that of the tasks' command, the repository's, or the system's.
find_python() {
    local command candidate
    [ "${#dpdist_container[@]}" = 0 ] || return 0
    command=$(command -v "${dpdist_command[0]:-}" || true)
    for candidate in "$command" "${command%/*}/python" "${job_repository:-}/.venv/bin/python" python3; do
        [[ ${candidate##*/} == python* ]] && command -v "$candidate" >/dev/null || continue
        job_python=$candidate
        ! verdict time UNLIMITED 1 >/dev/null 2>&1 || return 0
    done
    job_python=python3
}

# begin_job [RUN_DIR]: once, before the first srun. A job without a run directory trains nothing; `begin_run` names it later.
begin_job() {
    job_run_dir=""
    job_log=$(readlink /proc/$$/fd/2 || true)
    local name
    for name in DPDIST_MAX_RESTARTS DPDIST_MIN_NODES DPDIST_GRACE DPDIST_PROBE_SECONDS; do
        [[ ${!name-} =~ ^[0-9]*$ ]] || die "$name = ${!name}: give a whole number"
    done
    job_id=${SLURM_JOB_ID:-0}
    # One job of an array: SLURM_JOB_ID may be that of the whole array. A job that one of an array has submitted inherits
    # these variables, and is none.
    if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then
        job_id=${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID-}
        [ "$(job_field JobId)" = "${SLURM_JOB_ID:-}" ] || { job_id=${SLURM_JOB_ID:-0} && unset SLURM_ARRAY_JOB_ID SLURM_ARRAY_TASK_ID; }
    fi
    job_again=0 job_left_out="" job_last_words=""
    # For `dpdist logs` and the goodput of the run: tasks can see neither from where they are.
    export DPDIST_LOG=$job_log DPDIST_QUEUED
    DPDIST_QUEUED=$(queued_seconds || true)
    job_nodes=$(scontrol show hostnames "${SLURM_JOB_NODELIST:-}" 2>/dev/null | xargs || true)
    job_tasks=${SLURM_TASKS_PER_NODE:-}
    job_step_options=()
    find_python
    [ "${SLURM_RESTART_COUNT:-0}" = 0 ] || tell_silent_end
    if [ -n "${1-}" ]; then begin_run "$1"; else begin_start; fi
}

# begin_run RUN_DIR: the job trains this run.
begin_run() {
    local limit refusal
    job_run_dir=$1
    limit=$(squeue --noheader --jobs="$job_id" --format=%l 2>/dev/null || true)
    refusal=$(verdict time "$limit" "${DPDIST_GRACE:-300}" || true)
    [ -z "$refusal" ] || die "$refusal"
    begin_start
}

# tell_silent_end: of the start before this one, where nobody was left to say how it ended.
tell_silent_end() {
    local last
    last=$(grep -E '^(dpdist job: |\+ job )' "$job_log" 2>/dev/null | tail -1 || true)
    [[ $last != "+ job "* ]] || note "start $((SLURM_RESTART_COUNT - 1)) ended without a last line: its first node died, or SLURM" \
        "killed its batch script"
}

# queued_seconds: print how long this start of the job waited in the queue; nothing where SLURM does not say. A requeued
# job has the time at which it was requeued as its time of submission.
queued_seconds() {
    local submitted started
    submitted=$(job_field SubmitTime) started=$(job_field StartTime)
    [ -n "$submitted" ] && [ -n "$started" ] || return 1
    submitted=$(date -d "$submitted" +%s 2>/dev/null) && started=$(date -d "$started" +%s 2>/dev/null) || return 1
    [ "$started" -lt "$submitted" ] || echo $((started - submitted))
}

# begin_start: what lies there from before a start, to tell it at the end from what this start wrote.
begin_start() {
    job_begin=${job_run_dir:+$(verdict begin "$job_run_dir" || true)}
    # The lines of this start alone: a requeued job appends to the logs of its former starts.
    declare -gA job_log_begin=()
    local file files
    mapfile -t files < <(job_logs)
    for file in ${files[@]+"${files[@]}"}; do job_log_begin[$file]=$(stat -L -c %s "$file" 2>/dev/null || echo 0); done
}

# job_logs: this shell's log, and those of the other ranks where each has one of its own (`dpdist submit`).
job_logs() {
    [ ! -f "$job_log" ] || echo "$job_log"
    [[ $job_log == *_0_log.err ]] || return 0
    local file
    for file in "${job_log%_0_log.err}"_*_log.err; do [ "$file" = "$job_log" ] || echo "$file"; done
}

# log_of_start: the lines of this start, with the number of the rank in front where its log is a file of its own.
log_of_start() {
    local file files rank
    mapfile -t files < <(job_logs)
    for file in ${files[@]+"${files[@]}"}; do
        rank=${file#"${job_log%_0_log.err}"_} rank=${rank%_log.err}
        if [ "$file" != "$job_log" ]; then
            tail -c "+$((${job_log_begin[$file]:-0} + 1))" "$file" | sed "s/^/$rank: /"
        else
            tail -c "+$((${job_log_begin[$file]:-0} + 1))" "$file"
        fi
    done
}

# pass_on SIGNAL: a notice that reached this shell alone (--signal=B:TERM) goes to all ranks, as the TERM they know. Where the job
# is cancelled, requeued or at its limit, SLURM tells the ranks itself, and after KillWait kills those that are left, and this shell.
pass_on() {
    local kill_wait
    if [[ $(job_field JobState) == RUNNING ]]; then
        note "this shell was told to leave by SIG$1; all ranks are told"
        scancel --quiet --signal=TERM "$job_id" || true
        return 0 # by itself, the status of what the signal has interrupted, which would end this shell
    fi
    kill_wait=$(timeout 5 scontrol show config 2>/dev/null | sed -n 's/^KillWait *= *\([0-9]*\).*/\1/p' || true)
    job_last_words=$((SECONDS + ${kill_wait:-30} * 2 / 3))
}

# say_last_words: why the job ends, while this shell can still say so; where the ranks leave after all, another line follows.
say_last_words() {
    job_last_words=""
    judge ""
    [ "${job_verdict[0]}" != over ] || say "${job_verdict[5]}; ranks of it are still running"
    job_verdict=()
}

# job_field NAME: what SLURM says of this job.
job_field() { timeout 10 scontrol show job --oneliner "$job_id" 2>/dev/null | grep -oE "\b$1=[^ ]+" | head -1 | cut -d= -f2 || true; }

# wait_for_step PID: sets job_step_code, its exit code; nothing where srun had to be killed. After a rank has ended badly srun
# ends the others, by a TERM that a rank in a collective never sees, and waits minutes for a node that is dead.
wait_for_step() {
    local step=$1 timer since=0 patience=5 first="" killer=""
    job_step_code=0
    while kill -0 "$step" 2>/dev/null; do
        sleep "$([ -z "$first$job_last_words" ] && echo 5 || echo 1)" &
        timer=$!
        wait -n "$step" "$timer" 2>/dev/null || true
        kill "$timer" 2>/dev/null || true
        [ -z "$job_last_words" ] || [ "$SECONDS" -lt "$job_last_words" ] || say_last_words
        if [ -z "$first" ]; then
            first=$(first_death)
            since=$SECONDS
            [[ $first != *"exit code 75" && $first != *Terminated ]] || patience=30 # they have saved, and are leaving
        elif [ $((SECONDS - since)) -ge $((patience + 5)) ]; then
            kill -KILL "$step" 2>/dev/null || true
            wait "$step" 2>/dev/null || true
            job_step_code=""
            return 0
        elif [ $((SECONDS - since)) -ge "$patience" ] && [ -z "$killer" ]; then
            kill_ranks & # it waits for nodes that are dead
            killer=$!
        fi
    done
    wait "$step" 2>/dev/null || job_step_code=$?
}

# first_death: srun's first line on a rank that ended badly, in this start.
first_death() {
    [ ! -f "$job_log" ] || tail -c "+$((${job_log_begin[$job_log]:-0} + 1))" "$job_log" \
        | grep -m 1 -E '^srun: error: [^ ]+: tasks? ' || true
}

# kill_ranks: kill what earlier steps of this job have left on its nodes, so that the next one finds the run free. By a step of
# our own: SLURM gives a rank that it has told to leave KillWait (30 s), and has scancel wait as long, whatever the signal.
kill_ranks() {
    # shellcheck disable=SC2016  # Its variables are those of the nodes.
    on_each_node '
        below() { local child; for child in $(pgrep -P "$1"); do below "$child"; echo "$child"; done; }
        pgrep -af "^slurmstepd: \[$SLURM_JOB_ID\.[0-9]+\]" | while read -r daemon _ step; do
            step=${step##*.}
            [ "${step%]}" -lt "$SLURM_STEP_ID" ] || continue
            for task in $(pgrep -P "$daemon"); do # of another cluster on this machine it has another log
                ! grep -qzxF "DPDIST_LOG=$DPDIST_LOG" "/proc/$task/environ" || { below "$task"; echo "$task"; }
            done
        done | xargs --no-run-if-empty kill -KILL'
}

# answering_nodes: those on which a task can be started now. srun waits long for one that does not answer; we do not.
answering_nodes() { on_each_node 'echo "$SLURMD_NODENAME"' | xargs; }

# on_each_node COMMAND: run it once on each node that answers in time. In a shell that does not tell of what it kills.
on_each_node() (
    exec 2>/dev/null
    timeout --signal=KILL "${DPDIST_PROBE_SECONDS:-20}" srun --overlap --export=ALL --nodes="$(wc -w <<<"$job_nodes")" \
        --ntasks-per-node=1 --ntasks="$(wc -w <<<"$job_nodes")" --nodelist="${job_nodes// /,}" --cpus-per-task=1 --gpus-per-node=0 \
        bash -c "$1" || true
)

# judge CODE: what to do next, as job_verdict: action, exit code, nodes, tasks, nodes to leave out, the reason.
judge() {
    local -a known=(
        "code=$1" "job=${SLURM_JOB_ID:-}" "run_dir=$job_run_dir" "begin=$job_begin" "restarts=${SLURM_RESTART_COUNT:-0}"
        "again=$job_again" "distribution=${SLURM_DISTRIBUTION:-}"
        "most=${DPDIST_MAX_RESTARTS:-20}" "nodes=$job_nodes" "tasks=$job_tasks" "left_out=$job_left_out" "min_nodes=${DPDIST_MIN_NODES:-}"
        "left=$(squeue --noheader --jobs="$job_id" --format=%L 2>/dev/null || true)"
        "grace=${DPDIST_GRACE:-300}" "state=$(job_field JobState)" "restarts_now=$(job_field Restarts)"
    )
    job_verdict=()
    mapfile -t job_verdict < <(log_of_start | verdict judge "${known[@]}")
    if [ "${job_verdict[0]:-}" = probe ]; then
        note "${job_verdict[5]}; asking the nodes whether they answer"
        known+=("alive=$(answering_nodes)")
        mapfile -t job_verdict < <(log_of_start | verdict judge "${known[@]}")
    fi
    [ "${#job_verdict[@]}" = 6 ] && return
    local why="no Python could say more: ${job_python:-that of the container} cannot run dpdist_launch.slurm.verdict"
    case $1 in
        0) job_verdict=(done 0 "" 0 "" "done; $why") ;;
        75) job_verdict=(requeue 75 "" 0 "" "preempted; requeued; $why") ;;
        *) job_verdict=(fail "${1:-1}" "" 0 "" "failed (exit code ${1:-1}); $why") ;;
    esac
}

# supervise SRUN-ARGUMENT...: srun, and again while that helps. Returns once it is known how the job ends.
supervise() {
    local signal
    for signal in TERM USR1 USR2; do
        # shellcheck disable=SC2064  # This signal is meant.
        trap "pass_on $signal" "$signal"
    done
    while :; do
        # --export: with --export=NONE for sbatch, a rule at some sites, srun would keep the site file's exports to itself.
        command srun --export=ALL ${job_step_options[@]+"${job_step_options[@]}"} "$@" &
        wait_for_step $!
        judge "$job_step_code"
        [ "${job_verdict[0]}" = again ] || return "${job_verdict[1]}"
        go_on
    done
}

# go_on: prepare another srun in this allocation, without the nodes that do not answer.
go_on() {
    note "${job_verdict[5]}"
    job_again=$((job_again + 1))
    if [ -n "${job_verdict[4]}" ]; then
        # A node that SLURM gives up later must not take the job along.
        scontrol update JobId="$job_id" NodeList="${job_verdict[2]}" >/dev/null \
            || note "could not give back ${job_verdict[4]}, as the line above says"
        rm -f "slurm_job_${SLURM_JOB_ID}_resize.sh" "slurm_job_${SLURM_JOB_ID}_resize.csh"
        job_nodes=${job_verdict[2]//,/ } job_tasks=${job_verdict[3]} job_left_out+=" ${job_verdict[4]//,/ }"
    fi
    # --overlap: SLURM counts the former step as running until its last node has answered.
    job_step_options=(--overlap --nodelist="${job_verdict[2]}" --nodes="$(wc -w <<<"$job_nodes")" --ntasks="$((${job_verdict[3]//,/+}))")
    begin_start
}

# end_job CODE: do what was found right after the last srun, which returned CODE; the reason is the last line.
end_job() {
    [ -n "${job_verdict[*]-}" ] || judge "$1"
    local action=${job_verdict[0]} code=${job_verdict[1]} reason=${job_verdict[5]} until excluded
    [ "$action" != again ] || reason="failed (exit code $code) before it began to train" # nobody is there to start it
    say "$reason"
    [ "$action" != done ] || exit 0
    [ "$action" = requeue ] || exit "$code"
    trap '' TERM # SLURM ends this shell as it requeues the job; there is something left to do
    if ! scontrol requeue "$job_id"; then
        say "not requeued, as the line above says: submit it again [$reason]"
        exit "$code"
    fi
    [ -n "${job_verdict[4]}" ] || exit 0
    until=$((SECONDS + 20)) # then KillWait is near
    while [ "$SECONDS" -lt "$until" ]; do # only a job in the queue can be told
        excluded=$(job_field ExcNodeList) # by the user, and by earlier starts
        [[ $excluded != "(null)" ]] || excluded=${job_verdict[4]}
        [[ ,$excluded, == *,${job_verdict[4]},* ]] || excluded+=,${job_verdict[4]}
        # Without an answer, the user's own would be lost.
        [[ $excluded != ,* ]] && scontrol update JobId="$job_id" ExcNodeList="$excluded" 2>/dev/null && exit 0
        sleep 1
    done
    say "requeued, but could not exclude ${job_verdict[4]}: scontrol update JobId=$job_id ExcNodeList=$excluded"
    exit 0
}
