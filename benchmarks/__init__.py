"""Is it worth switching? ``python -m benchmarks`` measures, ``python -m benchmarks.train`` trains.

Reading order: shapes.py (what), implementations.py and peers.py (who), operations.py (which call),
workload.py (on which gradients), gate.py (right or wrong), timing.py (how long), host.py (what a
call costs the host), suite.py (one case, as the records of results.py), then the ways out: table.py,
plot.py, check.py, report.py, and command_line.py and __main__.py around it all.

train.py (command line), training.py (side by side), gpt.py (the model), training_results.py (the file).
"""
