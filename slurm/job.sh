# What dpdist's batch scripts share: the site's settings, the command to run, and how a job ends. train_80gpu.sh and
# scaling.sh source it, `dpdist submit` writes it into the script that it submits. Bash, inside a SLURM job.

# Files of the user's in the working directory, such as json.py, stand in for no module that a task imports.
export PYTHONSAFEPATH=1

die() { echo "dpdist job: $*" >&2; exit 2; }

# read_site REPOSITORY: the site's own file, DPDIST_SITE or slurm/site.sh. Sets dpdist_container, what to put in front of a
# command so that it runs in the site's container (nothing where there is none), and dpdist_command.
read_site() {
    local site=${DPDIST_SITE:-$1/slurm/site.sh}
    # shellcheck disable=SC1090
    if [ -f "$site" ]; then . "$site"; fi
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
}

# as_task COMMAND...: run it where the tasks run. A container may have other paths than this shell.
as_task() { if [ "${#dpdist_container[@]}" = 0 ]; then "$@"; else "${dpdist_container[@]}" "$@"; fi; }

# stamp_summary: print what changes whenever the summary of the run is written; nothing where there is none.
stamp_summary() { as_task stat -c '%i %Y' "$job_run_dir/summary.json" 2>/dev/null || true; }

# summary_says PATTERN: succeed where the run's summary has a status that matches.
summary_says() { as_task grep -qsE "\"status\": \"($1)\"" "$job_run_dir/summary.json" 2>/dev/null; }

# begin_job [RUN_DIR]: remember what lies there from before, to tell it at the end from what this start wrote. A job
# without a run directory trains nothing.
begin_job() {
    job_run_dir=${1-}
    job_summary=${job_run_dir:+$(stamp_summary)}
    # The lines of this start alone: a requeued job appends to the log of its former starts.
    job_log=$(readlink /proc/$$/fd/2 || true)
    job_log_begin=$(stat -L -c %s "$job_log" 2>/dev/null || echo 0)
    # For `dpdist logs` and the goodput of the run: tasks can see neither from where they are.
    export DPDIST_LOG=$job_log DPDIST_QUEUED
    DPDIST_QUEUED=$(queued_seconds || true)
}

# queued_seconds: print how long this start of the job waited in the queue; nothing where SLURM does not say. A requeued
# job has the time at which it was requeued as its time of submission.
queued_seconds() {
    local job submitted started
    job=$(timeout 5 scontrol show job --oneliner "$SLURM_JOB_ID" 2>/dev/null) || return 1
    submitted=$(date -d "$(grep -oP ' SubmitTime=\K\S+' <<<"$job")" +%s 2>/dev/null) || return 1
    started=$(date -d "$(grep -oP ' StartTime=\K\S+' <<<"$job")" +%s 2>/dev/null) || return 1
    [ "$started" -lt "$submitted" ] || echo $((started - submitted))
}

# run_has_ended LOG: succeed where this start brought the run to its end, or found it there and said so. That all processes
# returned 0 is no proof: they may have been another program.
run_has_ended() {
    summary_says "finished|budget_exhausted" || return 1
    [ "$job_summary" != "$(stamp_summary)" ] || [ ! -f "$job_log" ] || grep -q "nothing to do" <<<"$1"
}

# end_job CODE: requeue what was preempted and saved; otherwise exit with CODE, the reason on the last line.
end_job() {
    local code=$1 lines="" first reason restarts=${SLURM_RESTART_COUNT:-0} most=${DPDIST_MAX_RESTARTS:-20}
    [ ! -f "$job_log" ] || lines=$(tail -c "+$((job_log_begin + 1))" "$job_log")
    if [ "$code" = 0 ]; then
        if [ -z "$job_run_dir" ] || run_has_ended "$lines"; then
            echo "dpdist job: done" >&2
            exit 0
        fi
        echo "dpdist job: failed: all processes returned 0, but $job_run_dir/summary.json does not say that this run has ended;" \
            "what was started seems to be something other than dpdist" >&2
        exit 1
    fi
    # srun reports in the order of events, and then ends the others; its own code is only the highest of all.
    first=$(grep -m 1 -oE 'error: [^ ]+: tasks? .*' <<<"$lines" || true)
    # A saved preemption counts also where srun killed a rank that was still leaving. A rank that is told to leave before
    # it has joined knows no other way than to end, and nothing is lost.
    if { [ "$job_summary" != "$(stamp_summary)" ] && summary_says preempted; } \
        || [[ $first == *"exit code 75" || $first == *": Terminated" ]]; then
        [ "$restarts" -lt "$most" ] || {
            echo "dpdist job: preempted, and already restarted $restarts times (DPDIST_MAX_RESTARTS): submit it again" >&2
            exit 75
        }
        echo "dpdist job: preempted; requeued (start $((restarts + 1)) of at most $most more), and held for two minutes by SLURM" >&2
        # One job of an array has the number of the whole array, which would be requeued with it.
        [ "$SLURM_JOB_ID" != "${SLURM_ARRAY_JOB_ID:-}" ] || SLURM_JOB_ID+=_$SLURM_ARRAY_TASK_ID
        scontrol requeue "$SLURM_JOB_ID" && exit 0
        echo "dpdist job: preempted, but not requeued, as the line above says: submit it again" >&2
        exit 75
    fi
    reason=$(grep -m 1 -oE '(dpdist|dpdist job): (error|failed).*|watchdog: .*' <<<"$lines" || true)
    echo "dpdist job: failed (exit code $code)${reason:+: $reason}${first:+ [first of all, ${first#error: }]}" >&2
    exit "$code"
}
