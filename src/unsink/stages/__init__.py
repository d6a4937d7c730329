"""The commands' work: `run(params, layout, ...)` reads and writes files, all below takes values.

One file each, and what several of them share: `audited`, `confirmed` and `variants`.
"""
