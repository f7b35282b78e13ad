"""The benchmarks: thinpool beside its peers, in one run on one machine.

A front end: it uses what everybody may use, makes pools of its own, and leaves nothing behind.
``runner`` runs suites and keeps what they find (``results``) on disk after every case; ``marks``
compares that with what was promised; ``report``, ``plots`` and ``document`` show it.

Rules of every comparison: same run, same disk below, same durability, subjects in turns, the
repetitions that were asked for, medians with their spread, warm and cold named. What is missing on
this host is named and skipped.
"""
