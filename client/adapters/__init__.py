"""Everstep inside other training loops, with the names and habits of each.

One module for each host; it imports its host, so it is imported only when asked for: `everstep`
gives each class under a short name, at first use.
"""
