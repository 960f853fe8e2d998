"""Where records go: one file each, found by the registry; see ``contract.py`` for how to write one."""
