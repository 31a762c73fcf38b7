"""Is it worth switching? ``python -m benchmarks`` measures, ``python -m benchmarks.train`` trains.

Reading order: machine.py (clocks and bandwidth), operations.py (what is measured), cases.py (on which
shapes and gradients), contenders.py (torch, our backends, other libraries), compositions.py (torch's
operations where it has no function), gate.py (checks results), measure.py (measures times), results.py (the
files), terminal.py (what a run prints), report.py and plot.py (README's numbers and the figures), then
plan.py (the options) and __main__.py (a run).

train.py trains the model of gpt.py once with each implementation, side by side, and survival.py trains it
with bad steps. distributed.py clips DTensors on gloo ranks, distributed_results.py has what it found.
gpu_design.py, with the kernels of gpu_probes.py, measures the properties of a GPU that the design of the CUDA
kernels depends on. second_pass.py has what these were predicted to take beside what was measured.
"""
