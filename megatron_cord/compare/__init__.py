"""Several methods on several seeds with one budget, and what can be said about their differences.

``methods`` are configurations of the one trainer, ``plan`` makes runs of them, ``running`` runs these one after the other and takes up what is
there, ``results`` reads them, ``statistics`` and ``tables`` say what came out.
"""
