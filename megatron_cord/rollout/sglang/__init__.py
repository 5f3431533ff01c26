"""Rollouts on SGLang servers: how a server is started (`server`), in a process of its own (`process`), without CUDA too (`cpu_standins`)."""
