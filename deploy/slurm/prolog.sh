#!/bin/sh
# Starts the job's user's agent on each node of a Slurm job, and tells the job's tasks where it is.
#
# In slurm.conf, with this file on every node:
#   Prolog=/etc/slurm/everstep-prolog.sh
#   PrologFlags=Alloc
#   TaskProlog=/etc/slurm/everstep-prolog.sh
# As Prolog it runs as root outside the job's cgroup, so the agent and its snapshots in memory
# outlive the job and serve the next one, a requeued one included. As TaskProlog it prints the
# variable for the task. Job-private /dev/shm (job_container/tmpfs with Shared= or Dirs=/dev/shm)
# must be off, since agent and trainers share it.
#
# Never fails: a prolog that does would drain the node, and training works without an agent.

configuration=/etc/everstep.toml

case "${SLURM_SCRIPT_CONTEXT:-}" in
prolog_slurmd)
    uid=${SLURM_JOB_UID:-}
    user=${SLURM_JOB_USER:-}
    [ -n "$uid" ] && [ -n "$user" ] || exit 0
    home=/var/lib/everstep/$uid
    ;;
prolog_task)
    # Not left to the default: the job inherits XDG_RUNTIME_DIR from the login node.
    uid=$(id -u)
    echo "export EVERSTEP_HOME=/var/lib/everstep/$uid"
    exit 0
    ;;
*)
    exit 0
    ;;
esac

install -d -m 0711 /var/lib/everstep || exit 0
install -d -m 0700 -o "$uid" "$home" || exit 0
[ -r "$configuration" ] || configuration=

# A second agent ends at once when it finds the first one at the socket, so no look is needed here.
# env -i: nothing of the job reaches the agent. The log is opened as the user, never as root: the
# directory is the user's, who could have left a link there.
setsid runuser -u "$user" -- env -i PATH="$PATH" HOME="$home" \
    EVERSTEP_HOME="$home" EVERSTEP_CONFIG="$configuration" \
    sh -c 'exec everstep agent >>"$EVERSTEP_HOME/agent.log" 2>&1' </dev/null >/dev/null 2>&1 &

exit 0
