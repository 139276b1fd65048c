"""What client and agent owe each other: the gRPC contract, ids, errors, failpoints.

Imports nothing of Everstep, and importing this package imports neither grpc nor protobuf.
"""
