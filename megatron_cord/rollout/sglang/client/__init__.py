"""Requests to SGLang servers over HTTP."""
