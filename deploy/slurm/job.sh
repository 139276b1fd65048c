#!/bin/sh
# A job whose nodes protect each other: an agent on each node of the allocation, then the training.
#
#   sbatch job.sh
#
# The agents end with the job. Their arenas stay in /dev/shm for a requeued job on the same nodes,
# and what was flushed stays on the nodes' disks. To keep agents across jobs, use prolog.sh with
# peers_file in /etc/everstep.toml instead. Needs no job-private /dev/shm (see prolog.sh).

#SBATCH --job-name=everstep-example
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --requeue
# Time for the agents to flush after SIGTERM: at least agent.shutdown_timeout_s.
#SBATCH --signal=TERM@60

port=7400
export EVERSTEP_HOME="/var/tmp/everstep-$(id -u)"

# One agent a node, beside the tasks. They name themselves as Slurm names the nodes.
# --insecure: on the cluster's own network. Elsewhere, name a file with [tls] by EVERSTEP_CONFIG.
srun --overlap --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" \
    --ntasks-per-node=1 --cpus-per-task=1 --kill-on-bad-exit=0 sh -c '
        install -d -m 0700 "$EVERSTEP_HOME" || exit 1
        exec everstep agent --listen "0.0.0.0:$1" --insecure --peers-slurm "$1" \
            --log-file "$EVERSTEP_HOME/agent.log"
    ' agent "$port" &
agents=$!

# Trainers find the agent of their node by EVERSTEP_HOME.
srun --overlap python train.py
status=$?

kill -TERM "$agents"
wait "$agents"
exit "$status"
