"""Rollouts on SGLang servers.

client: requests over HTTP. weight_sync: the trainer's weights into running servers. server: starting and watching
    servers.
plugin: what runs in the servers' interpreter. `engine` and `control` put these together.
"""
