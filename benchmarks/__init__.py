"""Is it worth switching? ``python -m benchmarks`` measures, ``python -m benchmarks.train`` trains.

Reading order: shapes.py (what), implementations.py (who), operations.py (which call),
workload.py (on which gradients), gate.py (right or wrong), timing.py (how long), suite.py
(all of it, as records), then the ways out: table.py, plot.py, __main__.py.
"""
