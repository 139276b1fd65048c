"""A node of which every part but `agent.state` is a model: files, trainers, network, faults."""
