"""The embedded host: a compact HSTU ranking trainer that needs no other project.

`import hpgr_plugin.hosts.embedded` in a gin file makes the names of its configuration known.
"""

from hpgr_plugin.config.registry import register

register("components", "data", "embedded")
