"""``python -m everstep.agent VERB ...``: the CLI, for where the script is not on the path."""

from everstep.agent.cli import main

main()
