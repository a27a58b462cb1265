"""Many models x recipes x targets in one unattended batch: `secateurs zoo`.

    spec ──► entries ──► keys: a hash of all that determines a result ──► jobs ──► executors: this machine, or Ray
    supervise: one process per model, its time and memory watched ──► worker: runs one recipe and writes results/KEY.json
    leaderboard, page, table: every verdict and reason, from the results

The process that a user starts stays free of torch. Whatever a model does to its own process leaves the others unharmed.
"""
