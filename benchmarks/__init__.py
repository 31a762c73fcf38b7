"""Is it worth switching? ``python -m benchmarks`` measures, ``python -m benchmarks.train`` trains.

Reading order: machine.py (clocks and bandwidth), cases.py (shapes, operations, gradients), contenders.py
(torch, our backends, other libraries), gate.py (is the result right?), measure.py (how long does it
take?), results.py (the files), terminal.py (what a run prints), report.py and plot.py (README's numbers and
the figures), then plan.py (the options) and __main__.py (a run).

train.py trains the model of gpt.py with each clipping side by side. gpu_design.py measures what decides
how the CUDA kernels work.
"""
