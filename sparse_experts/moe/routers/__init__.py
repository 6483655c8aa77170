"""Ways of routing, one file each; `moe.registry` finds them by name."""
