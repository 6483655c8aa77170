"""Routers, one file each; `moe.registry` finds them by name."""
