"""Comparisons: several methods on several seeds with one budget, and their differences with intervals.

``methods`` are configurations of the one trainer, ``plan`` makes runs of them, ``running`` runs those that are not
complete, ``kept`` is what outlives their directories, ``finished`` reads those that were made elsewhere, ``results``
gathers them, ``tables`` and ``chart`` show the result.
"""
