"""Enabling the plugin in a program that does not know of it; see ``bc-plugin run``.

The folder goes first on ``PYTHONPATH``, so that Python imports its ``sitecustomize`` at start.
"""
