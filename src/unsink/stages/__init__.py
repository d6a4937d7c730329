"""The commands' work, one file each; `run(params, layout, ...)` reads and writes files, all below takes values."""
